//! A real browser without a window, driven over its own protocol: pages are loaded, keys pressed, pictures taken.
//!
//! Chromium reads requests from descriptor 3 and writes answers to descriptor 4 (`--remote-debugging-pipe`), each a JSON text
//! ended by a zero byte; a shell puts our pipes there.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Names under which Chromium and its kin are found.
const NAMES: [&str; 6] =
    ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell"];
/// How long the browser may take for one answer; machines that test are busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    requests: u64,
    page: String,
    /// A page of its own to look at pictures on.
    desk: String,
    loaded: bool,
    complaints: Vec<String>,
    profile: TempDir,
}

/// What a picture of a page shows.
#[derive(Debug)]
pub struct Picture {
    /// Pixels from left to right.
    pub width: u64,
    /// Pixels from top to bottom.
    pub height: u64,
    /// Colours that are different from each other.
    pub colours: u64,
    /// Fraction of the pixels that are not of the most frequent colour.
    pub ink: f64,
}

impl Browser {
    /// The browser of this machine: `FULGURITE_BROWSER`, or what is on the path. Without one the reason is said on stderr and a test
    /// has nothing to do, unless `FULGURITE_NEED_BROWSER=1` asks for one.
    pub fn find() -> Option<Self> {
        let runs = |name: &str| {
            let version = Command::new(name).arg("--version").stderr(Stdio::null()).output();
            version.is_ok_and(|output| output.status.success())
        };
        if let Ok(named) = std::env::var("FULGURITE_BROWSER") {
            assert!(runs(&named), "FULGURITE_BROWSER={named} does not run");
            return Some(Self::start(&named));
        }
        if let Some(name) = NAMES.into_iter().find(|name| runs(name)) {
            return Some(Self::start(name));
        }
        let reason = format!("no browser: none of {} runs, and FULGURITE_BROWSER names none", NAMES.join(", "));
        let needed = std::env::var("FULGURITE_NEED_BROWSER").is_ok_and(|value| !value.is_empty() && value != "0");
        assert!(!needed, "{reason}");
        // Past the test harness, which shows nothing of what a passing test prints.
        let _ = writeln!(std::io::stderr(), "not looked at in a browser: {reason}");
        None
    }

    fn start(browser: &str) -> Self {
        let profile = tempfile::tempdir().unwrap();
        let log = File::create(profile.path().join("log")).unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null", browser])
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"])
            .args(["--force-color-profile=srgb", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let to = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let (send, from) = channel();
        thread::spawn(move || {
            let mut message = Vec::new();
            while answers.read_until(0, &mut message).is_ok_and(|bytes| bytes > 0) {
                message.pop();
                let Ok(value) = serde_json::from_slice(&message) else { return };
                if send.send(value).is_err() {
                    return;
                }
                message.clear();
            }
        });
        let none = String::new();
        let mut started = Self {
            child,
            to,
            from,
            requests: 0,
            page: none.clone(),
            desk: none,
            loaded: false,
            complaints: Vec::new(),
            profile,
        };
        started.desk = started.open();
        started.page = started.open();
        let page = started.page.clone();
        // A page behind another one is not painted, and its picture is waited for without end.
        for method in ["Page.bringToFront", "Page.enable", "Runtime.enable", "Log.enable"] {
            started.call(&page, method, json!({}));
        }
        started
    }

    fn open(&mut self) -> String {
        let target = self.call("", "Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let session = self.call("", "Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        session["sessionId"].as_str().unwrap().to_owned()
    }

    /// The next message, sorted into what is kept of events; none after `wait`.
    fn message(&mut self, wait: Duration) -> Option<Value> {
        let message = self.from.recv_timeout(wait).ok()?;
        let of = &message["params"];
        match message["method"].as_str() {
            Some("Page.loadEventFired") => self.loaded = true,
            Some("Runtime.exceptionThrown") => self.complaints.push(of["exceptionDetails"].to_string()),
            Some("Log.entryAdded") if of["entry"]["level"] == "error" => self.complaints.push(of["entry"].to_string()),
            Some("Runtime.consoleAPICalled") if of["type"] == "error" => self.complaints.push(of["args"].to_string()),
            _ => {}
        }
        Some(message)
    }

    fn call(&mut self, session: &str, method: &str, params: Value) -> Value {
        self.requests += 1;
        let mut request = json!({ "id": self.requests, "method": method, "params": params });
        if !session.is_empty() {
            request["sessionId"] = session.into();
        }
        let mut bytes = request.to_string().into_bytes();
        bytes.push(0);
        let sent = self.to.write_all(&bytes).and_then(|()| self.to.flush());
        let until = Instant::now() + PATIENCE;
        while sent.is_ok() {
            let Some(message) = self.message(until.saturating_duration_since(Instant::now())) else { break };
            if message["id"] == self.requests {
                assert!(message["error"].is_null(), "{method}: {}", message["error"]);
                return message["result"].clone();
            }
        }
        let log = std::fs::read_to_string(self.profile.path().join("log")).unwrap_or_default();
        panic!("the browser does not answer {method}; it said:\n{log}");
    }

    /// Loads a page in a window of this width and 900 pixels of height.
    pub fn visit(&mut self, url: &str, width: u64) {
        let page = self.page.clone();
        let size = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false });
        self.call(&page, "Emulation.setDeviceMetricsOverride", size);
        self.loaded = false;
        let went = self.call(&page, "Page.navigate", json!({ "url": url }));
        assert!(went["errorText"].is_null(), "{url}: {went}");
        let until = Instant::now() + PATIENCE;
        while !self.loaded {
            assert!(self.message(until.saturating_duration_since(Instant::now())).is_some(), "{url} does not load");
        }
    }

    /// The value of an expression of JavaScript on the page, after its promise is kept.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let page = self.page.clone();
        self.evaluate_on(&page, expression)
    }

    fn evaluate_on(&mut self, session: &str, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call(session, "Runtime.evaluate", params);
        assert!(answer["exceptionDetails"].is_null(), "{expression:.200}: {}", answer["exceptionDetails"]);
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true.
    pub fn wait_for(&mut self, expression: &str) {
        let until = Instant::now() + PATIENCE;
        while self.evaluate(expression) != true {
            assert!(Instant::now() < until, "never true: {expression}\n{}", self.complaints.join("\n"));
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Presses a key of the keyboard and lets it go.
    pub fn press(&mut self, key: &str) {
        let page = self.page.clone();
        let mut down = json!({ "type": "keyDown", "key": key });
        if key.chars().count() == 1 {
            down["text"] = key.into();
        }
        self.call(&page, "Input.dispatchKeyEvent", down);
        self.call(&page, "Input.dispatchKeyEvent", json!({ "type": "keyUp", "key": key }));
    }

    /// A picture of the page from its top, of up to 6,000 pixels of its height.
    pub fn picture(&mut self) -> Picture {
        let page = self.page.clone();
        let size = self.call(&page, "Page.getLayoutMetrics", json!({}))["cssContentSize"].clone();
        let height = size["height"].as_f64().unwrap().min(6000.0);
        let clip = json!({ "x": 0, "y": 0, "width": size["width"], "height": height, "scale": 1 });
        let params = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let png = self.call(&page, "Page.captureScreenshot", params)["data"].as_str().unwrap().to_owned();
        let desk = self.desk.clone();
        let seen = self.evaluate_on(
            &desk,
            &format!(
                "(async () => {{
                    const image = new Image();
                    image.src = 'data:image/png;base64,{png}';
                    await image.decode();
                    const canvas = new OffscreenCanvas(image.width, image.height), pen = canvas.getContext('2d');
                    pen.drawImage(image, 0, 0);
                    const pixels = new Uint32Array(pen.getImageData(0, 0, image.width, image.height).data.buffer);
                    const counts = new Map();
                    for (const pixel of pixels) counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
                    const ink = 1 - Math.max(...counts.values()) / pixels.length;
                    return {{width: image.width, height: image.height, colours: counts.size, ink}};
                }})()"
            ),
        );
        let number = |key: &str| seen[key].as_u64().unwrap();
        Picture {
            width: number("width"),
            height: number("height"),
            colours: number("colours"),
            ink: seen["ink"].as_f64().unwrap(),
        }
    }

    /// What the page's scripts and the browser complained of so far.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
