//! A training run of its own: one file of settings, the token shards of any run, a directory for the result.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use pipeline::JournalEntry;
use serde::{Deserialize, Serialize};
use tokenize::loader::Location;
use tokenize::stages::{TOKEN_STATISTICS, TOKENS, TOKENS_VALIDATION};
use tokenize::{TokenStatistics, tokenizer_path};

use crate::config::TrainConfig;
use crate::data::{Data, Place, Places, bytes_per_token};
use crate::parallel::{Collective, Team, all_of};
use crate::run::{Metrics, Outcome, Run, train};
use crate::{Error, files, published};

/// The settings of a training run: everything that it depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Name of the run: `runs/NAME`.
    pub name: String,
    /// What it is, for people.
    #[serde(default)]
    pub description: String,
    /// The token shards: a run's directory, a directory of token shards, or the URL of one of these
    /// (`s3://bucket/runs/fineweb`).
    pub tokens: String,
    /// The run.
    pub train: TrainConfig,
}

/// How a job is to be run.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Where checkpoints and metrics go.
    pub directory: &'a Path,
    /// The device that trains.
    pub device: &'a Device,
    /// The ranks that train together; all have called [`Job::run`].
    pub group: &'a Arc<dyn Collective>,
    /// As in [`Run::profile_steps`].
    pub profile_steps: u64,
    /// As in [`Run::stop`].
    pub stop: &'a AtomicBool,
}

impl Job {
    /// Runs the job, or continues it where it stopped. Leaves the group at the end: what fails here, the other ranks hear.
    ///
    /// # Errors
    /// As [`train`], and [`Error::Data`] for shards that cannot be read.
    pub fn run(&self, options: &Options<'_>, on_step: &mut dyn FnMut(&Metrics)) -> Result<Outcome, Error> {
        let outcome = self.work(options, on_step);
        options.group.leave(outcome.as_ref().err().map(ToString::to_string).as_deref());
        outcome
    }

    fn work(&self, options: &Options<'_>, on_step: &mut dyn FnMut(&Metrics)) -> Result<Outcome, Error> {
        let group = options.group.as_ref();
        let rows = Team::new(options.group, &self.train)?.rows();
        let (training, run) = self.locations()?;
        let held_out = run.as_ref().map(|run| run.join(TOKENS_VALIDATION));
        let held_out = held_out.filter(|_| self.train.evaluation.every_steps > 0);
        let places = Places { training: Place::At(training), held_out: held_out.map_or(Place::None, Place::IfAt) };
        let Data { mut source, held_out, config } = Data::open(&places, &self.train, rows, group.rank() == 0)?;
        if held_out.is_none() && config.evaluation.every_steps > 0 {
            tracing::warn!("no loss is evaluated: there are no held-out documents beside the tokens");
        }
        // Rank 0 may have to copy it.
        let tokenizer = match &run {
            Some(run) if group.rank() == 0 => tokenizer(run, options.directory)?,
            _ => None,
        };
        let path = tokenizer.map_or(String::new(), |path| path.to_string_lossy().into_owned());
        let path = all_of(group, Ok(path))?.swap_remove(0);
        let tokenizer = Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty());
        let statistics = run
            .as_ref()
            .map(statistics)
            .and_then(|read| read.inspect_err(|reason| tracing::warn!("no bits per byte are told: {reason}")).ok());
        let run = Run {
            config: &config,
            device: options.device,
            group: options.group,
            directory: options.directory,
            tokenizer: tokenizer.as_deref(),
            held_out: held_out.as_ref(),
            bytes_per_token: statistics.as_ref().and_then(bytes_per_token),
            profile_steps: options.profile_steps,
            stop: options.stop,
        };
        train(&run, &mut source, on_step)
    }

    /// The token shards, and the run that they belong to where they lie in one.
    fn locations(&self) -> Result<(Location, Option<Location>), Error> {
        let path = if self.tokens.contains("://") {
            let of = |url: &str| Location::of_url(url).map_err(|e| Error::config("tokens", e.to_string()));
            let url = self.tokens.trim_end_matches('/');
            match (of(url)?, url.strip_suffix(TOKENS).and_then(|run| run.strip_suffix('/'))) {
                (Location::Directory(path), _) => path,
                (tokens, Some(run)) => return Ok((tokens, Some(of(run)?))),
                (run, None) => return Ok((run.join(TOKENS), Some(run))),
            }
        } else {
            PathBuf::from(&self.tokens)
        };
        if path.join(TOKENS).is_dir() {
            return Ok((Location::Directory(path.join(TOKENS)), Some(Location::Directory(path))));
        }
        if !path.is_dir() {
            let reason = format!("{} is no directory of a run and none of token shards", path.display());
            return Err(Error::config("tokens", reason));
        }
        // The directory of a stage lies in that of its run; that of the name `tokens` alone is `.`.
        let run = path.parent().filter(|_| path.file_name().is_some_and(|name| name == TOKENS));
        let run = run.map(|run| if run.as_os_str().is_empty() { Path::new(".") } else { run }.to_owned());
        Ok((Location::Directory(path), run.map(Location::Directory)))
    }
}

/// The tokenizer of a run: its own file, or a copy in `directory` where it lies elsewhere. None where the run has none.
fn tokenizer(run: &Location, directory: &Path) -> Result<Option<PathBuf>, Error> {
    let name = tokenizer_path(Path::new(""));
    if let Location::Directory(run) = run {
        return Ok(Some(run.join(name)).filter(|path| path.exists()));
    }
    let copy = directory.join(published::TOKENIZER);
    match run.join(&name.to_string_lossy()).read() {
        Ok(bytes) => files::replace(&copy, |path| fs::write(path, &bytes).map_err(Error::io(path)))?,
        Err(error) => {
            tracing::warn!("checkpoints get no tokenizer and no samples are written: {error}");
            return Ok(None);
        }
    }
    Ok(Some(copy))
}

/// What the run says of its tokens.
fn statistics(run: &Location) -> Result<TokenStatistics, String> {
    let journal = run.join(&format!("{TOKEN_STATISTICS}/journal.jsonl"));
    let bytes = journal.read().map_err(|error| error.to_string())?;
    let line = bytes.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty());
    let line = line.ok_or_else(|| format!("{journal}: the stage is not done"))?;
    let fault = |error: serde_json::Error| format!("{journal}: {error}");
    let entry: JournalEntry = serde_json::from_slice(line).map_err(fault)?;
    serde_json::from_value(entry.notes).map_err(fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locations(tokens: &str) -> Result<(String, Option<String>), Error> {
        let job =
            Job { name: "a".into(), description: String::new(), tokens: tokens.into(), train: TrainConfig::default() };
        job.locations().map(|(tokens, run)| (tokens.to_string(), run.map(|run| run.to_string())))
    }

    #[test]
    fn tokens_are_named_by_their_run_or_their_stage() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().to_str().unwrap();
        let tokens = format!("{run}/{TOKENS}");
        assert!(locations(&tokens).unwrap_err().to_string().contains("no directory of a run"));
        fs::create_dir(&tokens).unwrap();
        for name in [run.to_owned(), tokens.clone(), format!("file://{run}"), format!("file://{tokens}/")] {
            assert_eq!(locations(&name).unwrap(), (tokens.clone(), Some(run.to_owned())), "{name}");
        }
        let other = format!("{run}/web-tokens");
        fs::create_dir(&other).unwrap();
        assert_eq!(locations(&other).unwrap(), (other, None));
        for (name, tokens, run) in [
            ("https://host/runs/web", "https://host/runs/web/tokens", "https://host/runs/web"),
            ("https://host/runs/web/tokens/", "https://host/runs/web/tokens", "https://host/runs/web"),
            ("https://host/runs/web-tokens", "https://host/runs/web-tokens/tokens", "https://host/runs/web-tokens"),
        ] {
            assert_eq!(locations(name).unwrap(), (tokens.to_owned(), Some(run.to_owned())), "{name}");
        }
        assert!(locations("ftp://host/runs").is_err());
    }
}
