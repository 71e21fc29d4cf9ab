//! Patterns of paths in a recipe.

use std::path::{Path, PathBuf};

use globset::Glob;
use pipeline::{Error, Result};

/// Where a recipe looks for older runs.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// Directory that paths are relative to.
    pub base: &'a Path,
    /// Directory of the run itself, which is no older run even where a pattern matches it; none, if there is no run yet.
    pub run_dir: Option<&'a Path>,
}

impl<'a> From<&'a Path> for Places<'a> {
    fn from(base: &'a Path) -> Self {
        Self { base, run_dir: None }
    }
}

/// The directories that the patterns of key `key` name, in the order of the recipe, those of a pattern by name. Those of
/// the run itself are left out: `runs/2025-*` of the run `runs/2025-12` means the others, in its second start as in its first.
pub(crate) fn indices(key: &str, patterns: &[String], places: Places<'_>) -> Result<Vec<PathBuf>> {
    let base = places.base;
    // A run that never began has no directory that could be matched.
    let own = places.run_dir.and_then(|dir| dir.canonicalize().ok());
    let is_own =
        |dir: &PathBuf| own.as_ref().is_some_and(|own| dir.canonicalize().is_ok_and(|dir| dir.starts_with(own)));
    let mut found = Vec::new();
    for pattern in patterns {
        let mut matched = Vec::new();
        expand(base, pattern, &mut matched)?;
        let what = if matched.is_empty() { "nothing" } else { "nothing but this run itself" };
        matched.retain(|dir| !is_own(dir));
        if matched.is_empty() {
            return Err(Error::Recipe(format!("{key}: {what} matches {pattern} in {}", base.display())));
        }
        found.extend(matched);
    }
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|dir| seen.insert(dir.clone()));
    Ok(found)
}

/// Append what `pattern` matches in `base`, part by part, by name. A part without a match adds nothing.
pub(crate) fn expand(base: &Path, pattern: &str, found: &mut Vec<PathBuf>) -> Result<()> {
    let (part, rest) = pattern.split_once('/').unwrap_or((pattern, ""));
    if pattern.is_empty() {
        if base.exists() {
            found.push(base.to_path_buf());
        }
        return Ok(());
    }
    if part.is_empty() {
        return expand(Path::new("/"), rest, found);
    }
    if !part.contains(['*', '?', '[', '{']) {
        return expand(&base.join(part), rest, found);
    }
    let glob = Glob::new(part).map_err(|e| Error::Recipe(format!("{pattern}: {e}")))?.compile_matcher();
    let Ok(entries) = std::fs::read_dir(base) else { return Ok(()) };
    let mut names: Vec<_> = entries.filter_map(|e| Some(e.ok()?.file_name())).filter(|n| glob.is_match(n)).collect();
    names.sort();
    names.into_iter().try_for_each(|name| expand(&base.join(name), rest, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_no_older_run_of_itself() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b-1/index", "b-2/index"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        std::os::unix::fs::symlink(dir.path().join("b-2"), dir.path().join("b-link")).unwrap();
        let found = |pattern: &str, run: &str| {
            let run_dir = dir.path().join(run);
            let places = Places { base: dir.path(), run_dir: Some(&run_dir) };
            indices("near.against", &[pattern.into()], places).map(|found| {
                found.iter().map(|p| p.strip_prefix(dir.path()).unwrap().display().to_string()).collect::<Vec<_>>()
            })
        };
        assert_eq!(found("b-*/index", "b-2").unwrap(), ["b-1/index"], "nor by another path");
        assert_eq!(found("b-[12]/index", "b-3").unwrap(), ["b-1/index", "b-2/index"]);
        let error = found("b-2/index", "b-2").unwrap_err().to_string();
        assert!(error.contains("near.against: nothing but this run itself matches b-2/index"), "{error}");
        let error = found("c/index", "b-2").unwrap_err().to_string();
        assert!(error.contains("near.against: nothing matches c/index"), "{error}");
    }

    #[test]
    fn patterns_match_part_by_part() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b-2/index", "b-1/index", "b-3/other", "c/index"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let found = |pattern: &str| {
            let mut found = Vec::new();
            expand(dir.path(), pattern, &mut found).unwrap();
            found.iter().map(|p| p.strip_prefix(dir.path()).unwrap().display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(found("b-*/index"), ["b-1/index", "b-2/index"]);
        assert_eq!(found("c/index"), ["c/index"]);
        assert_eq!(found("*/nothing"), [""; 0]);
        let absolute = format!("{}/[bc]*", dir.path().display());
        assert_eq!(found(&absolute), ["b-1", "b-2", "b-3", "c"]);
    }
}
