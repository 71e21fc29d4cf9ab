//! Event files of TensorBoard: scalars by step.
//!
//! A file is a sequence of records (length, its checksum, bytes, their checksum; checksums are CRC-32C, masked), the bytes
//! a protocol buffer `Event` of which five fields are used: `wall_time` 1, `step` 2, `file_version` 3, `summary` 5 with
//! `value` 1 of `tag` 1 and `simple_value` 2.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::Error;

/// Writes one event file.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    writer: BufWriter<File>,
}

impl EventFile {
    /// A new file in `directory`, which is made where it is not there. A run that is continued adds a file; TensorBoard
    /// shows the newest value of a step.
    ///
    /// # Errors
    /// [`Error::Io`] with the file that cannot be written.
    pub fn create(directory: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
        let time = now();
        let path = directory.join(format!("events.out.tfevents.{}.{}", time as u64, std::process::id()));
        let writer = BufWriter::new(File::create(&path).map_err(Error::io(&path))?);
        let mut file = Self { path, writer };
        let mut event = Vec::new();
        double(&mut event, 1, time);
        bytes(&mut event, 3, b"brain.Event:2");
        file.record(&event)?;
        Ok(file)
    }

    /// Adds the values of a step.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), Error> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut one = Vec::new();
            bytes(&mut one, 1, tag.as_bytes());
            key(&mut one, 2, 5);
            one.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &one);
        }
        let mut event = Vec::new();
        double(&mut event, 1, now());
        key(&mut event, 2, 0);
        varint(&mut event, step);
        bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    fn record(&mut self, event: &[u8]) -> Result<(), Error> {
        let length = (event.len() as u64).to_le_bytes();
        let parts = [&length[..], &masked(&length).to_le_bytes(), event, &masked(event).to_le_bytes()];
        let written = parts.iter().try_for_each(|part| self.writer.write_all(part));
        written.and_then(|()| self.writer.flush()).map_err(Error::io(&self.path))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// CRC-32C, turned and shifted as the format wants it.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn key(to: &mut Vec<u8>, field: u64, wire: u64) {
    varint(to, field << 3 | wire);
}

fn varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

fn double(to: &mut Vec<u8>, field: u64, value: f64) {
    key(to, field, 1);
    to.extend(value.to_le_bytes());
}

fn bytes(to: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(to, field, 2);
    varint(to, value.len() as u64);
    to.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_hold_their_length_and_checksums() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(directory.path()).unwrap();
        file.scalars(300, &[("loss", 2.5), ("rate", 0.125)]).unwrap();
        let content = std::fs::read(&file.path).unwrap();
        let mut rest = &content[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked(&rest[..8]).to_le_bytes());
            let event = &rest[12..12 + length];
            assert_eq!(rest[12 + length..16 + length], masked(event).to_le_bytes());
            events.push(event.to_vec());
            rest = &rest[16 + length..];
        }
        assert_eq!(events.len(), 2);
        assert!(events[0].ends_with(b"brain.Event:2"));
        // Field 1, a double; field 2, 300 in two bytes; field 5, two values of tag and float.
        assert_eq!(events[1][9..12], [0x10, 0xac, 0x02]);
        let summary = &events[1][12..];
        assert_eq!(summary[..2], [0x2a, summary.len() as u8 - 2]);
        assert_eq!(summary[2..10], [0x0a, 11, 0x0a, 4, b'l', b'o', b's', b's']);
        assert_eq!(summary[10..15], [0x15, 0, 0, 0x20, 0x40]);
        // The checksum of the format's own example.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    }
}
