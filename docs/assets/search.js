// The search would take the end of "RT-1:" for a field's name and find nothing at all.
const QUERY = 2;
const post = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message, ...rest) {
  if (message?.type === QUERY)
    message = { ...message, data: message.data.replace(/:(?=\s|$)/g, "") };
  return post.call(this, message, ...rest);
};
