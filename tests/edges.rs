//! One direction of imports: src → {dedup, tokenize, train} → pipeline, and train → tokenize.
//! docs/ARCHITECTURE.md says why; this test keeps it true.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::MetadataCommand;

#[test]
fn imports_go_one_way() {
    let metadata = MetadataCommand::new().no_deps().other_options(vec!["--offline".into()]).exec().unwrap();
    let members: BTreeSet<String> = metadata.workspace_packages().iter().map(|p| p.name.to_string()).collect();
    let found: BTreeMap<String, BTreeSet<String>> = metadata
        .workspace_packages()
        .iter()
        .map(|package| {
            let edges = package.dependencies.iter().map(|d| d.name.clone()).filter(|d| members.contains(d)).collect();
            (package.name.to_string(), edges)
        })
        .collect();
    let expected: BTreeMap<String, BTreeSet<String>> = [
        ("fulgurite", vec!["pipeline", "dedup", "tokenize", "train"]),
        ("dedup", vec!["pipeline"]),
        ("tokenize", vec!["pipeline"]),
        ("train", vec!["pipeline", "tokenize"]),
        ("pipeline", vec![]),
    ]
    .into_iter()
    .map(|(name, edges)| (name.to_string(), edges.into_iter().map(String::from).collect()))
    .collect();
    assert_eq!(found, expected, "a new edge between workspace members is a change of the architecture");
}

/// Words that say nothing about what a module is for.
const EMPTY_NAMES: [&str; 7] = ["utils", "util", "helpers", "helper", "common", "misc", "manager"];

#[test]
fn no_module_has_an_empty_name_and_no_source_has_an_open_end() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut left: Vec<_> = ["src", "pipeline", "dedup", "tokenize", "train", "tests"].map(|d| root.join(d)).to_vec();
    let mut seen = 0;
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if stem != "target" {
                    left.push(path);
                }
                continue;
            }
            if path.extension().is_none_or(|e| e != "rs") {
                continue;
            }
            seen += 1;
            assert!(!EMPTY_NAMES.contains(&stem.as_str()), "{}: a name that says nothing", path.display());
            let text = std::fs::read_to_string(&path).unwrap();
            // Written apart, so that this file does not find itself.
            for open in [concat!("to", "do!("), concat!("unimple", "mented!("), concat!("#[ig", "nore]")] {
                assert!(!text.contains(open), "{}: {open}", path.display());
            }
        }
    }
    assert!(seen > 30, "only {seen} source files were found");
}
