//! Patterns of paths in a recipe.

use std::path::{Path, PathBuf};

use globset::Glob;
use pipeline::{Error, Result};

/// The directories that the patterns of key `key` name, in the order of the recipe, those of a pattern by name.
pub(crate) fn indices(key: &str, patterns: &[String], base: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for pattern in patterns {
        let before = found.len();
        expand(base, pattern, &mut found)?;
        if found.len() == before {
            return Err(Error::Recipe(format!("{key}: nothing matches {pattern} in {}", base.display())));
        }
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
