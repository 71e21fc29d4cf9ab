//! Cutting the input into tasks: a function of the sorted file list and the sizes alone, so that the
//! number of threads changes nothing.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::listing::{Compression, FileFormat, InputFile};

/// A file, or a range of its bytes, that one task reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// URI of the file.
    pub file: String,
    /// The range that owns the records starting in it; `None` is the whole file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<Range<u64>>,
}

/// Cut `files` into tasks of at most `split_bytes`, except for single files that cannot be cut.
pub fn plan(files: &[InputFile], split_bytes: u64) -> Vec<Vec<Split>> {
    let limit = split_bytes.max(1);
    let mut tasks: Vec<Vec<Split>> = Vec::new();
    let mut room = 0;
    let mut place = |split: Split, bytes: u64| {
        match tasks.last_mut() {
            Some(task) if bytes <= room => task.push(split),
            _ => {
                tasks.push(vec![split]);
                room = limit;
            }
        }
        room = room.saturating_sub(bytes);
    };
    for file in files {
        if file.size <= limit || !can_be_cut(file) {
            place(Split { file: file.uri.clone(), range: None }, file.size);
            continue;
        }
        for start in (0..file.size).step_by(usize::try_from(limit).unwrap_or(usize::MAX)) {
            let end = start.saturating_add(limit).min(file.size);
            place(Split { file: file.uri.clone(), range: Some(start..end) }, end - start);
        }
    }
    tasks
}

/// Whether records can be found from the middle of the file.
fn can_be_cut(file: &InputFile) -> bool {
    match file.format {
        FileFormat::Jsonl => file.compression == Compression::None,
        FileFormat::Parquet => true,
        FileFormat::Warc | FileFormat::Text => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(number: usize, size: u64, format: FileFormat, compression: Compression) -> InputFile {
        let uri = format!("{number:03}");
        InputFile { path: uri.clone().into(), uri, input: 0, format, compression, size, mtime_ns: 0 }
    }

    proptest! {
        #[test]
        fn every_byte_of_every_file_is_in_exactly_one_task_in_order(
            sizes in prop::collection::vec((0u64..500, 0u8..4), 0..40),
            limit in 1u64..200,
        ) {
            let files: Vec<InputFile> = sizes.iter().enumerate().map(|(i, (size, kind))| match kind {
                0 => file(i, *size, FileFormat::Jsonl, Compression::None),
                1 => file(i, *size, FileFormat::Jsonl, Compression::Zstd),
                2 => file(i, *size, FileFormat::Parquet, Compression::None),
                _ => file(i, *size, FileFormat::Text, Compression::None),
            }).collect();
            let tasks = plan(&files, limit);
            let mut covered = tasks.iter().flatten().peekable();
            for f in &files {
                let mut at = 0;
                loop {
                    let split = covered.next().unwrap();
                    prop_assert_eq!(&split.file, &f.uri);
                    match &split.range {
                        None => at = f.size,
                        Some(range) => {
                            prop_assert_eq!(range.start, at);
                            prop_assert!(range.end - range.start <= limit && can_be_cut(f));
                            at = range.end;
                        }
                    }
                    if at == f.size { break; }
                }
            }
            prop_assert!(covered.next().is_none());
            for task in &tasks {
                let bytes: Vec<u64> = task.iter().map(|s| match &s.range {
                    Some(r) => r.end - r.start,
                    None => files.iter().find(|f| f.uri == s.file).unwrap().size,
                }).collect();
                let alone = bytes.iter().filter(|b| **b > 0).count() == 1;
                prop_assert!(alone || bytes.iter().sum::<u64>() <= limit, "{bytes:?} in {task:?}");
            }
        }
    }
}
