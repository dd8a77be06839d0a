// A page that was opened from a folder may start no Worker from a file. It may load a script into a frame, so that the search
// runs in a hidden one; messages pass as to a Worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = Object.assign(document.createElement("iframe"), { hidden: true });
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source === inside) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      inside.document.open();
      inside.document.write(`<script>
        postMessage = (data) => parent.postMessage(data, "*");
        importScripts = (...urls) => urls.reduce((done, url) => done.then(() => new Promise((resolve) =>
          document.body.append(Object.assign(document.createElement("script"), { src: url, onload: resolve })))), Promise.resolve());
      <\/script><body><script src="${url}"><\/script></body>`);
      inside.document.close();
      this.ready = new Promise((resolve) => inside.addEventListener("load", resolve)); // after open(), which forgets listeners
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
