//! Where words go: data and results to stdout, everything else to stderr.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::cli::LogFormat;

/// One line of result. A closed pipe is an error, so that `… | head` ends the work.
pub fn line(text: impl AsRef<str>) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{}", text.as_ref())
}

/// Text of a result as it comes, without a line end, visible at once.
pub fn piece(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A result as one JSON document.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?)?;
    Ok(())
}

/// A line for people. What cannot be told is not told.
pub fn note(text: impl AsRef<str>) {
    let _ = writeln!(io::stderr().lock(), "{}", text.as_ref());
}

/// An error and its causes, each cause once.
pub fn error(error: &anyhow::Error, format: LogFormat) {
    if format == LogFormat::Json {
        return record("ERROR", &serde_json::json!({ "message": error.to_string(), "causes": causes(error) }));
    }
    let (red, plain) = if colour(&io::stderr()) { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
    let mut text = format!("{red}error{plain}: {error}");
    for cause in causes(error) {
        text.push_str(&format!("\n  because: {cause}"));
    }
    note(text);
}

/// The causes of an error that say something it has not said.
fn causes(error: &anyhow::Error) -> Vec<String> {
    let mut said = vec![error.to_string()];
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !said.iter().any(|s| s.contains(&cause)) {
            said.push(cause);
        }
    }
    said.split_off(1)
}

/// A line of `--log-format json`, of the form that the log's own lines have.
pub fn record(level: &str, fields: &impl Serialize) {
    let now = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    note(serde_json::json!({ "timestamp": now, "level": level, "fields": fields }).to_string());
}

/// Colours only on a terminal, and never against NO_COLOR (no-color.org).
pub fn colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Columns of text, aligned; the first row is the header.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    // A column of figures stands right.
    let figures: Vec<bool> = (0..columns)
        .map(|c| {
            rows.iter()
                .skip(1)
                .filter_map(|r| r.get(c))
                .all(|s| s.starts_with(|ch: char| ch.is_ascii_digit()) || s == "-")
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[c] - cell.chars().count());
            let gap = if c == 0 { "" } else { "  " };
            if figures[c] {
                line.push_str(&format!("{gap}{pad}{cell}"));
            } else {
                line.push_str(&format!("{gap}{cell}{pad}"));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.pop();
    text
}

/// 12_345_678 as `12,345,678`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, ch) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(ch);
    }
    text
}

/// Bytes as people read them.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_stand_right_and_words_left() {
        let rows = [["stage", "rows"], ["ingest", "1,200"], ["near", "7"]];
        let rows: Vec<Vec<String>> = rows.iter().map(|r| r.iter().map(|s| s.to_string()).collect()).collect();
        assert_eq!(table(&rows), "stage    rows\ningest  1,200\nnear        7");
        assert_eq!((thousands(1234567), bytes(1536)), ("1,234,567".into(), "1.5 KiB".into()));
    }
}
