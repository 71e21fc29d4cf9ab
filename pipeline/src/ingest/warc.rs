//! WARC and WET (ISO 28500): pages and texts of a crawl.
//!
//! Documents are `response` and `resource` records with HTML or plain text, and `conversion` records.
//! Records that are no document by their type (warcinfo, request, metadata, revisit, DNS) are passed over
//! and not counted; a response that is no page becomes a dropped row with its reason.
//!
//! Crawls hold records whose length field is wrong, cut files and broken gzip members. Every record
//! must end where the next begins; if it does not, it is quarantined, and reading goes on at the next
//! `WARC/1.` line or the next gzip member.

use std::borrow::Cow;
use std::io::{self, Read};

use datafusion::error::{DataFusionError, Result};
use serde_json::{Map, Value};

use super::bytes::blame;
use super::charset;
use super::config::FieldMapping;
use super::extract::{ExtractError, extract};
use super::http::{self, BodyError, Headers};
use super::json::parse_time;
use super::listing::Compression;
use super::members::Members;
use super::rows::{Document, EXCERPT_BYTES, Place, Reason, Rows};
use super::window::Window;

/// The line that begins a record.
const MAGIC: &[u8] = b"WARC/1.";
/// A longer head is none.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Read all records of a file of `size` stored bytes.
pub(super) fn read(
    input: impl Read + Send + 'static,
    compression: Compression,
    size: u64,
    fields: &FieldMapping,
    limit: usize,
    rows: &mut Rows,
) -> Result<()> {
    let mut file = Records {
        members: Members::new(input, compression)?,
        window: Window::new(0),
        records: 0,
        plain_size: (compression == Compression::None).then_some(size),
        member_ended: compression == Compression::Gzip,
        head: Vec::new(),
        fields,
        limit,
    };
    // Whether the last thing that happened was a jump over broken bytes: one quarantined record
    // stands for all of them.
    let mut jumped = false;
    loop {
        let before = file.records;
        match file.record(rows) {
            Ok(true) => jumped = false,
            Ok(false) => break,
            Err(Stop::Rows(e)) => return Err(e),
            Err(Stop::Input(e)) => {
                let (reason, detail) = blame(e)?;
                let met = file.records > before;
                if !met {
                    file.records += 1;
                    file.head.clear();
                }
                if !jumped || met {
                    let place = file.place(file.records - 1);
                    rows.count();
                    rows.quarantine(reason, place, None, &detail, &file.head)?;
                }
                file.window.clear();
                jumped = true;
                match file.members.skip_to_member() {
                    Ok(true) => file.member_ended = false,
                    Ok(false) => break,
                    Err(e) => {
                        return Err(blame(e).map_or_else(DataFusionError::from, |(_, e)| DataFusionError::Execution(e)));
                    }
                }
            }
        }
    }
    if file.records == 0 {
        rows.count();
        rows.quarantine(Reason::EmptyFile, file.place(0), None, "the file holds no record", b"")?;
    }
    Ok(())
}

/// Why reading a record stopped.
enum Stop {
    /// The bytes cannot be had.
    Input(io::Error),
    /// The rows cannot be handed on.
    Rows(DataFusionError),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Input(error)
    }
}

impl From<DataFusionError> for Stop {
    fn from(error: DataFusionError) -> Self {
        Self::Rows(error)
    }
}

/// How a block ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// After as many bytes as its length says.
    Whole,
    /// At the end of a gzip member before.
    Member,
    /// At the end of the file before.
    File,
}

struct Records<'a, R: Read> {
    members: Members<R>,
    /// Over the decompressed bytes.
    window: Window,
    /// Records met so far, of any type.
    records: u64,
    /// Size of a file that is not compressed.
    plain_size: Option<u64>,
    member_ended: bool,
    /// First bytes of the current record.
    head: Vec<u8>,
    fields: &'a FieldMapping,
    limit: usize,
}

impl<R: Read + Send + 'static> Records<'_, R> {
    /// Read one record; false at the end of the file.
    fn record(&mut self, rows: &mut Rows) -> Result<bool, Stop> {
        if !self.skip_to_content()? {
            return Ok(false);
        }
        let place = self.place(self.records);
        self.records += 1;
        self.head.clear();
        let bad = |rows: &mut Rows, reason, detail: &str, head: &[u8]| {
            rows.count();
            rows.quarantine(reason, place, None, detail, head)
        };
        let (block_start, head_end) = loop {
            let window = self.window.bytes();
            if window.len() >= MAGIC.len() && !window.starts_with(MAGIC) {
                self.keep_head();
                self.skip_to_record()?;
                bad(rows, Reason::InvalidRecord, "no record begins here", &self.head)?;
                return Ok(true);
            }
            if let Some(found) = http::head_end(window) {
                break found;
            }
            self.keep_head();
            if self.window.len() > MAX_HEAD_BYTES {
                self.skip_to_record()?;
                bad(rows, Reason::InvalidRecord, "the head of the record does not end", &self.head)?;
                return Ok(true);
            }
            if !self.fill()? {
                self.keep_head();
                self.window.clear();
                let (reason, detail) = if self.next_member()? {
                    (Reason::InvalidRecord, "the gzip member ends within the head of the record")
                } else {
                    (Reason::Truncated, "the file ends within the head of the record")
                };
                bad(rows, reason, detail, &self.head)?;
                return Ok(true);
            }
        };
        self.keep_head();
        let headers = Headers::parse(&self.window.bytes()[..head_end]);
        self.window.consume(block_start);
        let Some(length) = headers.get("content-length").and_then(|n| n.parse::<u64>().ok()) else {
            self.skip_to_next()?;
            bad(rows, Reason::InvalidRecord, "the record has no Content-Length", &self.head)?;
            return Ok(true);
        };
        if self.plain_size.is_some_and(|size| length > size.saturating_sub(self.window.offset())) {
            let (reason, detail) = if self.skip_to_next()? {
                (Reason::InvalidRecord, "Content-Length goes beyond the end of the file")
            } else {
                (Reason::Truncated, "the file ends within the record")
            };
            bad(rows, reason, detail, &self.head)?;
            return Ok(true);
        }
        let wanted = Kind::of(&headers);
        let held = match (wanted, usize::try_from(length)) {
            (Some(kind), Ok(length)) if length <= self.limit => Some((kind, length)),
            _ => None,
        };
        let end = match held {
            Some((_, length)) => self.hold(length)?,
            None => self.pass(length)?,
        };
        let problem = match end {
            End::Whole => {
                let after = held.map_or(0, |(_, length)| length);
                if self.record_ends_after(after)? {
                    None
                } else {
                    let block = &self.window.bytes()[..after];
                    // The length may reach into the records that follow: give them back.
                    match find_record(block) {
                        Some(at) => {
                            self.window.consume(at);
                        }
                        None => {
                            self.window.consume(after);
                            self.skip_to_record()?;
                        }
                    }
                    Some((Reason::InvalidRecord, format!("Content-Length {length} does not end where a record ends")))
                }
            }
            End::Member => {
                let detail = format!("the gzip member ends before the {length} bytes of Content-Length");
                Some((Reason::InvalidRecord, detail))
            }
            End::File => {
                Some((Reason::Truncated, format!("the file ends before the {length} bytes of Content-Length")))
            }
        };
        if let Some((reason, detail)) = problem {
            bad(rows, reason, &detail, &self.head)?;
            return Ok(true);
        }
        match (held, wanted) {
            (Some((kind, length)), _) => {
                rows.count();
                let block = &self.window.bytes()[..length];
                self.document(kind, &headers, block, place, rows)?;
                self.window.consume(length);
            }
            (None, Some(_)) => {
                let detail = format!("{length} bytes, max_record_bytes is {}", self.limit);
                bad(rows, Reason::TooLong, &detail, &self.head)?;
            }
            (None, None) => {}
        }
        Ok(true)
    }

    fn place(&self, index: u64) -> Place {
        let offset = if self.plain_size.is_some() { self.window.offset() } else { index };
        Place { unit: "record", number: Some(index + 1), offset }
    }

    /// Remember the first bytes of the record for whoever looks at it.
    fn keep_head(&mut self) {
        self.head.clear();
        let unread = self.window.bytes();
        self.head.extend_from_slice(&unread[..unread.len().min(EXCERPT_BYTES)]);
    }

    /// Skip the empty lines between records; false at the end of the file.
    fn skip_to_content(&mut self) -> io::Result<bool> {
        loop {
            let window = self.window.bytes();
            match window.iter().position(|b| !b"\r\n".contains(b)) {
                Some(at) => {
                    self.window.consume(at);
                    return Ok(true);
                }
                None => self.window.clear(),
            }
            if !self.fill()? && !self.next_member()? {
                return Ok(false);
            }
        }
    }

    /// Skip to the next line that begins a record, or to the end of the member; false if no such line
    /// was found.
    fn skip_to_record(&mut self) -> io::Result<bool> {
        loop {
            if let Some(at) = find_line(self.window.bytes()) {
                self.window.consume(at);
                return Ok(true);
            }
            // The line may lie across two chunks.
            self.window.consume(self.window.len().saturating_sub(MAGIC.len()));
            if !self.fill()? {
                self.window.clear();
                return Ok(false);
            }
        }
    }

    /// As [`Self::skip_to_record`], or stay where a record begins here.
    fn skip_to_next(&mut self) -> io::Result<bool> {
        Ok(self.record_begins_at(0)? || self.skip_to_record()?)
    }

    /// Have the next `length` bytes in the buffer.
    fn hold(&mut self, length: usize) -> io::Result<End> {
        while self.window.len() < length {
            if !self.fill()? {
                let there = self.window.len();
                if !self.next_member()? {
                    self.window.consume(there);
                    return Ok(End::File);
                }
                if self.record_begins_at(there)? {
                    self.window.consume(there);
                    return Ok(End::Member);
                }
            }
        }
        Ok(End::Whole)
    }

    /// Read past the next `length` bytes.
    fn pass(&mut self, mut length: u64) -> io::Result<End> {
        loop {
            let there = self.window.len();
            let n = usize::try_from(length).map_or(there, |length| length.min(there));
            self.window.consume(n);
            length -= n as u64;
            if length == 0 {
                return Ok(End::Whole);
            }
            if !self.fill()? {
                if !self.next_member()? {
                    return Ok(End::File);
                }
                if self.record_begins_at(0)? {
                    return Ok(End::Member);
                }
            }
        }
    }

    /// Whether a record begins `at` bytes from here.
    fn record_begins_at(&mut self, at: usize) -> io::Result<bool> {
        while self.window.len() < at + MAGIC.len() && self.fill()? {}
        Ok(self.window.bytes()[at..].starts_with(MAGIC))
    }

    /// Whether a record ends `at` bytes from here: with an empty line, as the format wants it, or with
    /// fewer line ends before the next record or the end of the member.
    fn record_ends_after(&mut self, mut at: usize) -> io::Result<bool> {
        let end = at;
        loop {
            let window = self.window.bytes();
            if window[end..].starts_with(b"\r\n\r\n") || window[end..].starts_with(b"\n\n") {
                return Ok(true);
            }
            match window[at..].iter().position(|b| !b"\r\n".contains(b)) {
                Some(lines) => return self.record_begins_at(at + lines),
                None => at = window.len(),
            }
            if !self.fill()? {
                return Ok(true);
            }
        }
    }

    /// Go to the next gzip member; false at the end of the file.
    fn next_member(&mut self) -> io::Result<bool> {
        let more = self.members.next_member()?;
        self.member_ended = !more;
        Ok(more)
    }

    /// Read a chunk; false at the end of the member.
    fn fill(&mut self) -> io::Result<bool> {
        if self.member_ended {
            return Ok(false);
        }
        self.member_ended = !self.window.fill(&mut self.members)?;
        Ok(!self.member_ended)
    }

    /// Make a row of a record.
    fn document(&self, kind: Kind, headers: &Headers, block: &[u8], place: Place, rows: &mut Rows) -> Result<()> {
        let url = headers.get("warc-target-uri").map(|uri| uri.trim_start_matches('<').trim_end_matches('>'));
        let page = match kind {
            Kind::Response => match http::parse(block) {
                Ok(response) if response.status != 200 => {
                    let detail = format!("HTTP status {}", response.status);
                    return rows.quarantine(Reason::HttpStatus, place, url, &detail, b"");
                }
                Ok(response) => match response.decoded_body(self.limit) {
                    Ok(body) => {
                        let body = body.into_owned();
                        page_text(&body, response.headers.get("content-type"), headers).map(|t| (t, response.headers))
                    }
                    Err(BodyError::TooLong) => {
                        Err(Refused::Record(Reason::TooLong, format!("the decoded body is longer than {}", self.limit)))
                    }
                    Err(BodyError::UnknownEncoding(name)) => {
                        Err(Refused::Record(Reason::ContentType, format!("Content-Encoding {name} is not known")))
                    }
                    Err(BodyError::Corrupt(detail)) => {
                        Err(Refused::Record(Reason::InvalidHttp, format!("the body cannot be decoded: {detail}")))
                    }
                },
                Err(detail) => Err(Refused::Record(Reason::InvalidHttp, detail)),
            },
            Kind::Resource => {
                page_text(block, headers.get("content-type"), headers).map(|text| (text, Headers::default()))
            }
            Kind::Conversion => match std::str::from_utf8(block) {
                Ok(text) => Ok((text.to_owned(), Headers::default())),
                Err(e) => Err(Refused::Record(
                    Reason::InvalidUtf8,
                    format!("not UTF-8 at byte {} of the block", e.valid_up_to()),
                )),
            },
        };
        let (text, http_headers) = match page {
            Ok(page) => page,
            Err(Refused::Run(error)) => return Err(rows.fault(place, url, &error.to_string())),
            Err(Refused::Record(reason, detail)) => return rows.quarantine(reason, place, url, &detail, block),
        };
        let header = |name: &str| headers.get(name).or_else(|| http_headers.get(name));
        let mut metadata = Map::new();
        if let Some(id) = self.fields.id.as_deref().and_then(header) {
            metadata.insert("id".into(), id.into());
        }
        for name in &self.fields.metadata {
            if let Some(value) = header(name) {
                metadata.insert(name.clone(), value.into());
            }
        }
        // Of several languages the first is the main one.
        let language = headers.get("warc-identified-content-language").and_then(|l| l.split(',').next()).map(str::trim);
        rows.keep(
            place,
            Document {
                text: Cow::Owned(text),
                url: url.map(Cow::Borrowed),
                language: language.filter(|l| !l.is_empty()).map(Cow::Borrowed),
                timestamp: headers.get("warc-date").and_then(parse_time),
                metadata: (!metadata.is_empty()).then(|| Value::Object(metadata).to_string()),
            },
        )
    }
}

/// What a record holds.
#[derive(Clone, Copy)]
enum Kind {
    Response,
    Resource,
    Conversion,
}

impl Kind {
    /// `None` for a record that is no document by its type.
    fn of(headers: &Headers) -> Option<Self> {
        match headers.get("warc-type")?.to_ascii_lowercase().as_str() {
            // Responses of other protocols than HTTP hold no pages.
            "response" if mime(headers.get("content-type")).is_none_or(|m| m == "application/http") => {
                Some(Self::Response)
            }
            "resource" => Some(Self::Resource),
            "conversion" => Some(Self::Conversion),
            _ => None,
        }
    }
}

fn mime(content_type: Option<&str>) -> Option<String> {
    let mime = content_type?.split(';').next()?.trim().to_ascii_lowercase();
    (!mime.is_empty()).then_some(mime)
}

/// Why a record gives no document.
enum Refused {
    /// Of itself.
    Record(Reason, String),
    /// Because nothing more can be extracted.
    Run(ExtractError),
}

/// The text of a page.
fn page_text(body: &[u8], content_type: Option<&str>, warc: &Headers) -> Result<String, Refused> {
    let mime = mime(content_type).or_else(|| mime(warc.get("warc-identified-payload-type")));
    let html = match mime.as_deref() {
        Some("text/html" | "application/xhtml+xml") => true,
        Some("text/plain") => false,
        None if body.trim_ascii_start().starts_with(b"<") => true,
        Some(other) => {
            return Err(Refused::Record(Reason::ContentType, format!("{other} is neither HTML nor plain text")));
        }
        None => return Err(Refused::Record(Reason::ContentType, "no Content-Type, and not HTML".into())),
    };
    let begin = &body[..body.len().min(1024)];
    let utf16 = begin.starts_with(&[0xff, 0xfe]) || begin.starts_with(&[0xfe, 0xff]);
    if begin.starts_with(&[0x1f, 0x8b]) || (begin.contains(&0) && !utf16) {
        return Err(Refused::Record(Reason::ContentType, "binary bytes in spite of the Content-Type".into()));
    }
    let charset = content_type.and_then(|value| {
        let at = value.to_ascii_lowercase().find("charset=")?;
        value[at + 8..].split(';').next()
    });
    let text = charset::decode(body, charset);
    if !html {
        return Ok(text.into_owned());
    }
    extract(&text).map_err(|e| match e {
        ExtractError::NoText => Refused::Record(Reason::NoText, e.to_string()),
        ExtractError::Stuck(_) => Refused::Run(e),
        other => Refused::Record(Reason::HtmlLimit, other.to_string()),
    })
}

/// Where the next line that begins a record begins, not counting the first.
fn find_line(bytes: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, b"\nWARC/1.").map(|at| at + 1)
}

/// Where the first record that follows an empty line begins.
fn find_record(block: &[u8]) -> Option<usize> {
    memchr::memmem::find_iter(block, b"\nWARC/1.")
        .find(|at| block[..*at].ends_with(b"\n") || block[..*at].ends_with(b"\n\r"))
        .map(|at| at + 1)
}
