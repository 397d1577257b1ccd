// Browsers start no worker from a file. For a site that is read from a disk the search runs in a
// hidden frame instead. The theme looks for this by its name.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #started;

    constructor(url) {
      super();
      this.#frame.hidden = true;
      this.#started = new Promise((started) => {
        this.#frame.onload = () => {
          this.#frame.onload = null;
          const inside = this.#frame.contentWindow;
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const script = inside.document.createElement("script");
          script.src = url;
          script.onload = () => started(inside);
          inside.document.body.append(script);
        };
      });
      document.body.append(this.#frame);
    }

    async postMessage(data) {
      (await this.#started).dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
