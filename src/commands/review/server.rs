//! The server of a review: one page and three answers, on the loopback interface alone.
//!
//! Only what a browser on this machine asks of this very address is answered: another site's page can neither read the
//! documents (the `Host` must be ours) nor set marks (the `Origin` must be ours). Documents reach the page as JSON and
//! are shown as text, and the page may load nothing.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pipeline::report::{Sample, Standing};
use pipeline::review::{Mark, Marks, precision};

const PAGE: &str = include_str!("page.html");
/// A longer head or mark is none of the page's (bytes).
const MAX_REQUEST: u64 = 16 << 10;
/// How long a connection may say nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// A bound server.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    address: SocketAddr,
    samples: Vec<Sample>,
    marks: Mutex<Marks>,
}

struct Answer {
    status: &'static str,
    kind: &'static str,
    body: String,
}

impl Answer {
    fn refusal(status: &'static str, body: impl Into<String>) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", body: body.into() }
    }

    fn json(body: String) -> Self {
        Self { status: "200 OK", kind: "application/json", body }
    }
}

impl Server {
    /// Takes the port, 0 for a free one.
    pub fn bind(port: u16, samples: Vec<Sample>, marks: Marks) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, state: Arc::new(State { address, samples, marks: Mutex::new(marks) }) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until the process ends.
    pub fn serve(&self) {
        for connection in self.listener.incoming().flatten() {
            let state = self.state.clone();
            // A browser opens connections that it does not use yet: each waits on a thread of its own.
            let worker = thread::Builder::new().name("review".into()).spawn(move || answer(&state, connection));
            if let Err(error) = worker {
                tracing::warn!("a connection was not answered: {error}");
            }
        }
    }
}

fn answer(state: &State, mut connection: TcpStream) {
    let _ = connection.set_read_timeout(Some(PATIENCE));
    let _ = connection.set_write_timeout(Some(PATIENCE));
    let Some(request) = Request::read(&connection) else { return };
    let answer = state.answer(&request);
    let head = format!(
        "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\nCache-Control: no-store\r\n\
         X-Content-Type-Options: nosniff\r\nContent-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n\r\n",
        answer.status,
        answer.kind,
        answer.body.len()
    );
    // Whoever asked may be gone.
    let _ = connection.write_all(head.as_bytes()).and_then(|()| connection.write_all(answer.body.as_bytes()));
}

impl State {
    fn answer(&self, request: &Request) -> Answer {
        let ours = [self.address.to_string(), format!("localhost:{}", self.address.port())];
        if !request.host.as_ref().is_some_and(|host| ours.contains(host)) {
            return Answer::refusal("421 Misdirected Request", "this page is for its own address alone");
        }
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/") => Answer { status: "200 OK", kind: "text/html; charset=utf-8", body: PAGE.into() },
            ("GET", "/documents") => to_json(&self.samples),
            ("GET", "/marks") => {
                let marks = self.marks.lock().unwrap_or_else(|e| e.into_inner());
                // A document is marked where the run still says of it what it was marked for.
                let stand = marks.all().filter(|(_, standing)| *standing == Standing::Stands);
                let stand: Vec<&Mark> = stand.map(|(mark, _)| mark).collect();
                to_json(&serde_json::json!({ "marks": stand, "precision": precision(marks.all()) }))
            }
            ("POST", "/marks") => self.mark(request, &ours),
            _ => Answer::refusal("404 Not Found", "there is no such page"),
        }
    }

    fn mark(&self, request: &Request, ours: &[String]) -> Answer {
        let from_us =
            request.origin.as_ref().is_none_or(|origin| ours.iter().any(|o| *origin == format!("http://{o}")));
        if !from_us || request.kind.as_deref() != Some("application/json") {
            return Answer::refusal("403 Forbidden", "marks come from the page itself, as JSON");
        }
        let mark: Mark = match serde_json::from_slice(&request.body) {
            Ok(mark) => mark,
            Err(error) => return Answer::refusal("400 Bad Request", format!("no mark: {error}")),
        };
        if !self.samples.iter().any(|s| s.id == mark.id && s.stage == mark.stage && s.rule == mark.rule) {
            return Answer::refusal("400 Bad Request", "that document is not under review");
        }
        let mut marks = self.marks.lock().unwrap_or_else(|e| e.into_inner());
        match marks.add(mark) {
            Ok(()) => to_json(&serde_json::json!({ "precision": precision(marks.all()) })),
            Err(error) => Answer::refusal("500 Internal Server Error", error.to_string()),
        }
    }
}

fn to_json(value: &impl serde::Serialize) -> Answer {
    match serde_json::to_string(value) {
        Ok(body) => Answer::json(body),
        Err(error) => Answer::refusal("500 Internal Server Error", error.to_string()),
    }
}

/// What of a request matters here.
#[derive(Debug, Default, PartialEq)]
struct Request {
    method: String,
    path: String,
    host: Option<String>,
    origin: Option<String>,
    kind: Option<String>,
    body: Vec<u8>,
}

impl Request {
    /// The next request; none for what is no request.
    fn read(input: impl Read) -> Option<Self> {
        let mut input = BufReader::new(input.take(MAX_REQUEST));
        let mut line = String::new();
        input.read_line(&mut line).ok()?;
        let mut parts = line.split_whitespace();
        let mut request = Self { method: parts.next()?.to_owned(), path: parts.next()?.to_owned(), ..Self::default() };
        let mut length = 0;
        loop {
            line.clear();
            if input.read_line(&mut line).ok()? == 0 {
                return None;
            }
            let header = line.trim_end();
            if header.is_empty() {
                break;
            }
            let (name, value) = header.split_once(':')?;
            let value = value.trim().to_owned();
            match name.to_ascii_lowercase().as_str() {
                "host" => request.host = Some(value),
                "origin" => request.origin = Some(value),
                "content-type" => request.kind = value.split(';').next().map(|kind| kind.trim().to_ascii_lowercase()),
                "content-length" => length = value.parse().ok()?,
                _ => {}
            }
        }
        input.take(length).read_to_end(&mut request.body).ok()?;
        (request.body.len() as u64 == length).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use pipeline::digest::Digest;

    use super::*;

    fn server(dir: &std::path::Path) -> SocketAddr {
        let sample = Sample {
            id: Digest(7),
            ordinal: 7,
            source: "web".into(),
            url: None,
            stage: "filter".into(),
            rule: Some("short".into()),
            value: Some(3.0),
            threshold: Some(50.0),
            detail: None,
            text: "<b>three words here".into(),
            chars: 19,
        };
        let server = Server::bind(0, vec![sample], Marks::open(dir, &[]).unwrap()).unwrap();
        let address = server.address();
        thread::spawn(move || server.serve());
        address
    }

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut connection = TcpStream::connect(address).unwrap();
        connection.write_all(request.replace("HERE", &address.to_string()).as_bytes()).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    }

    fn post(address: SocketAddr, headers: &str, body: &str) -> String {
        ask(
            address,
            &format!("POST /marks HTTP/1.1\r\nHost: HERE\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len()),
        )
    }

    #[test]
    fn marks_are_taken_from_the_page_alone() {
        let dir = tempfile::tempdir().unwrap();
        // A mark of before, of a stage that the run does not have any more.
        let past =
            r#"{"id":"00000000000000000000000000000007","stage":"mix","rule":null,"source":"web","mark":"unsure"}"#;
        std::fs::create_dir(dir.path().join("review")).unwrap();
        std::fs::write(Marks::path(dir.path()), format!("{past}\n")).unwrap();
        let address = server(dir.path());
        assert!(address.ip().is_loopback());
        let marks = || ask(address, "GET /marks HTTP/1.1\r\nHost: HERE\r\n\r\n");
        assert!(marks().contains("\"marks\":[]") && marks().contains("\"gone\":1"), "{}", marks());
        let page = ask(address, "GET / HTTP/1.1\r\nHost: HERE\r\n\r\n");
        assert!(
            page.starts_with("HTTP/1.1 200") && page.contains("Content-Security-Policy") && page.contains("</html>")
        );
        assert!(ask(address, "GET /documents HTTP/1.1\r\nHost: HERE\r\n\r\n").contains("<b>three words here"));

        let mark =
            r#"{"id":"00000000000000000000000000000007","stage":"filter","rule":"short","source":"web","mark":"drop"}"#;
        let json = "Content-Type: application/json\r\n";
        let taken = post(address, &format!("{json}Origin: http://{address}\r\n"), mark);
        assert!(taken.starts_with("HTTP/1.1 200") && taken.contains("\"precision\":1.0"), "{taken}");
        for (headers, body, status) in [
            (format!("{json}Origin: http://elsewhere.example\r\n"), mark.to_owned(), "403"),
            ("Content-Type: text/plain\r\n".into(), mark.to_owned(), "403"),
            (json.into(), mark.replace("7", "8"), "400"),
            (json.into(), mark.replace("filter", "near"), "400"),
            (json.into(), mark.replace("drop", "maybe"), "400"),
            (json.into(), "x".into(), "400"),
        ] {
            let answer = post(address, &headers, &body);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{headers}{body}: {answer}");
        }
        assert!(ask(address, "GET / HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n").starts_with("HTTP/1.1 421"));
        assert!(ask(address, "GET /etc/passwd HTTP/1.1\r\nHost: HERE\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert_eq!(ask(address, "nonsense\r\n\r\n"), "");
        assert_eq!(Marks::read(dir.path(), &[]).unwrap().len(), 2);
        assert!(marks().contains("\"mark\":\"drop\"") && !marks().contains("\"mark\":\"unsure\""), "{}", marks());
    }
}
