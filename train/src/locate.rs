//! From the path a person gives to the model it means, and what is in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::published::{self, CONFIG, MODEL};
use crate::run::CHECKPOINTS;
use crate::{Error, checkpoint};

/// The directory that holds the model meant by `path`: itself when it holds one, else the newest
/// checkpoint of the training run in it, or of the run whose `train` stage is in it. A checkpoint's
/// files are verified against their checksums.
///
/// # Errors
/// [`Error::NoModel`] when there is none, [`Error::Format`] when a file of it was changed.
pub fn locate(path: &Path) -> Result<PathBuf, Error> {
    if published::is_model(path) {
        return verified(path.to_owned());
    }
    for directory in [path.join(CHECKPOINTS), path.join("train").join(CHECKPOINTS), path.to_owned()] {
        if let Some((_, newest)) = checkpoint::list(&directory)?.pop() {
            return verified(newest);
        }
    }
    Err(Error::NoModel { path: path.to_owned() })
}

/// A checkpoint whose files have their checksums; a published model has none to check.
fn verified(directory: PathBuf) -> Result<PathBuf, Error> {
    if directory.join(checkpoint::STATE).exists() {
        checkpoint::verify(&directory)?;
    }
    Ok(directory)
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorFacts {
    /// Name.
    pub name: String,
    /// Type of the values.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
}

/// What is in a checkpoint or a published model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelFacts {
    /// Settings of the model, and where a checkpoint stands.
    pub facts: BTreeMap<String, serde_json::Value>,
    /// Its tensors, by name.
    pub tensors: Vec<TensorFacts>,
}

/// Describe the model meant by `path`.
///
/// # Errors
/// As [`locate`], and [`Error::Io`] and [`Error::Format`] for files that are not what they should be.
pub fn describe(path: &Path) -> Result<ModelFacts, Error> {
    let directory = locate(path)?;
    let mut facts: BTreeMap<String, serde_json::Value> = BTreeMap::new();
    facts.insert("path".into(), directory.display().to_string().into());
    if directory.join(checkpoint::STATE).exists() {
        facts.insert("checksums".into(), "match".into());
        let state = read_json(&directory.join(checkpoint::STATE))?;
        for key in ["step", "tokens", "loader"] {
            if let Some(value) = state.get(key) {
                facts.insert(key.into(), value.clone());
            }
        }
    }
    if let serde_json::Value::Object(config) = read_json(&directory.join(CONFIG))? {
        facts.extend(config);
    }
    let mut tensors = Vec::new();
    for file in published::tensor_files(&directory, MODEL, published::WEIGHTS)? {
        tensors.extend(header(&file)?);
    }
    let parameters: usize = tensors.iter().map(|t| t.shape.iter().product::<usize>()).sum();
    facts.insert("parameters".into(), parameters.into());
    Ok(ModelFacts { facts, tensors })
}

fn read_json(path: &Path) -> Result<serde_json::Value, Error> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::format(path, error))
}

/// What is taken of a tensor's entry in the header of a safetensors file.
#[derive(Deserialize)]
struct TensorInfo {
    dtype: String,
    shape: Vec<usize>,
}

/// The tensors of a safetensors file by name, from its header alone: a length of eight bytes and JSON.
fn header(path: &Path) -> Result<Vec<TensorFacts>, Error> {
    use std::io::Read;
    /// Headers are a few hundred bytes a tensor; more than this is not one.
    const LIMIT: u64 = 100 << 20;
    let mut file = std::fs::File::open(path).map_err(Error::io(path))?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(Error::io(path))?;
    let length = u64::from_le_bytes(length);
    if length > LIMIT {
        return Err(Error::format(path, format!("a header of {length} bytes")));
    }
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes).map_err(Error::io(path))?;
    let entries: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&bytes).map_err(|error| Error::format(path, error))?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, info) in entries.into_iter().filter(|(name, _)| name != "__metadata__") {
        let info: TensorInfo =
            serde_json::from_value(info).map_err(|error| Error::format(path, format!("{name}: {error}")))?;
        tensors.push(TensorFacts { name, dtype: info.dtype, shape: info.shape });
    }
    Ok(tensors)
}
