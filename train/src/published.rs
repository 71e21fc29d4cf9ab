//! The layout of the published checkpoints: `config.json`, `model.safetensors` and, beside them,
//! `tokenizer.json`.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::ModelConfig;
use crate::parameters::ParameterList;
use crate::tensors::{self, Shard, Store};
use crate::{Error, Model, files};

/// Name of the configuration in a model directory.
pub const CONFIG: &str = "config.json";
/// Name of the parameters in a model directory.
pub const MODEL: &str = "model.safetensors";
/// Name of the tokenizer in a model directory.
pub const TOKENIZER: &str = "tokenizer.json";
/// Begin of the names of files that ranks have written instead of [`MODEL`].
pub(crate) const WEIGHTS: &str = "weights";
/// End of the names of all files of tensors.
const TENSORS: &str = ".safetensors";

/// Name of the file of one rank.
pub(crate) fn shard_name(kind: &str, rank: usize, world: usize) -> String {
    format!("{kind}-{rank:05}-of-{world:05}{TENSORS}")
}

/// The files in `directory` that ranks have written under names with this begin, in the order of the ranks; `whole`
/// where there are none.
pub(crate) fn tensor_files(directory: &Path, whole: &str, kind: &str) -> Result<Vec<PathBuf>, Error> {
    let whole = directory.join(whole);
    if whole.exists() {
        return Ok(vec![whole]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        let path = entry.map_err(Error::io(directory))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.and_then(|name| name.strip_prefix(kind)).and_then(|name| name.strip_suffix(TENSORS));
        if name.is_some_and(|name| name.starts_with('-') && name.contains("-of-")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(if files.is_empty() { vec![whole] } else { files })
}

/// Whether there are parameters of a model in `directory`.
pub(crate) fn is_model(directory: &Path) -> bool {
    tensor_files(directory, MODEL, WEIGHTS).is_ok_and(|files| files.iter().all(|file| file.exists()))
}

/// The keys of `config.json` that say something about the network. A published file has more keys;
/// they do not matter here.
#[derive(Serialize, Deserialize)]
struct PublishedConfig {
    model_type: String,
    vocab_size: usize,
    decoder_embed_dim: usize,
    decoder_layers: usize,
    decoder_attention_heads: usize,
    hidden_dim: usize,
    glu_dim: usize,
    linear_use_lrpe_list: Vec<u8>,
    linear_act_fun: String,
    norm_type: String,
    #[serde(default)]
    no_scale_embedding: bool,
    #[serde(default)]
    bias: bool,
    #[serde(default = "default_init_std")]
    init_std: f64,
    #[serde(default)]
    pad_token_id: Option<u32>,
    #[serde(default)]
    bos_token_id: Option<u32>,
    #[serde(default)]
    eos_token_id: Option<u32>,
}

fn default_init_std() -> f64 {
    ModelConfig::default().init_std
}

impl From<&ModelConfig> for PublishedConfig {
    fn from(config: &ModelConfig) -> Self {
        Self {
            model_type: "transnormer".to_owned(),
            vocab_size: config.vocab_size,
            decoder_embed_dim: config.decoder_embed_dim,
            decoder_layers: config.decoder_layers,
            decoder_attention_heads: config.decoder_attention_heads,
            hidden_dim: config.hidden_dim,
            glu_dim: config.glu_dim,
            linear_use_lrpe_list: config.linear_use_lrpe_list.clone(),
            linear_act_fun: "silu".to_owned(),
            norm_type: "simplermsnorm".to_owned(),
            no_scale_embedding: config.no_scale_embedding,
            bias: false,
            init_std: config.init_std,
            pad_token_id: Some(config.pad_token_id),
            bos_token_id: Some(config.bos_token_id),
            eos_token_id: Some(config.eos_token_id),
        }
    }
}

/// Reads the sizes of a model from a `config.json`.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Format`] when it is not the configuration of a
/// TransNormerLLM or of a variant that is not implemented here, [`Error::Config`] when its sizes do
/// not fit each other.
pub fn read_config(path: &Path) -> Result<ModelConfig, Error> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let object: Map<String, Value> = serde_json::from_str(&text).map_err(|error| Error::format(path, error))?;
    // A file for another architecture is told by its type rather than by the first missing key.
    let fixed = [("model_type", "transnormer"), ("linear_act_fun", "silu"), ("norm_type", "simplermsnorm")];
    for (key, want) in fixed {
        let value = object.get(key).unwrap_or(&Value::Null);
        if value != want {
            let reason = format!("{key} is {value}, only \"{want}\" is implemented");
            return Err(Error::format(path, reason));
        }
    }
    let published: PublishedConfig =
        serde_json::from_value(Value::Object(object)).map_err(|error| Error::format(path, error))?;
    if published.bias {
        return Err(Error::format(path, "bias is true, only false is implemented"));
    }
    let defaults = ModelConfig::default();
    let config = ModelConfig {
        vocab_size: published.vocab_size,
        decoder_embed_dim: published.decoder_embed_dim,
        decoder_layers: published.decoder_layers,
        decoder_attention_heads: published.decoder_attention_heads,
        hidden_dim: published.hidden_dim,
        glu_dim: published.glu_dim,
        linear_use_lrpe_list: published.linear_use_lrpe_list,
        no_scale_embedding: published.no_scale_embedding,
        init_std: published.init_std,
        pad_token_id: published.pad_token_id.unwrap_or(defaults.pad_token_id),
        bos_token_id: published.bos_token_id.unwrap_or(defaults.bos_token_id),
        eos_token_id: published.eos_token_id.unwrap_or(defaults.eos_token_id),
    };
    config.validate()?;
    Ok(config)
}

/// The content of the `config.json` of a model of these sizes.
pub fn config_json(config: &ModelConfig) -> String {
    let mut text = serde_json::to_string_pretty(&PublishedConfig::from(config))
        .unwrap_or_else(|error| unreachable!("plain values are JSON: {error}"));
    text.push('\n');
    text
}

/// Loads the model in `directory` onto `device`.
///
/// # Errors
/// [`Error::Io`] and [`Error::Format`] with the file that is missing or is not what it has to be.
pub fn load(directory: &Path, device: &Device) -> Result<Model, Error> {
    let (config, values) = read(directory)?;
    Model::from_values(&config, values, device)
}

/// The sizes and the parameters of the model in `directory`, in the order of the parameter list.
///
/// # Errors
/// As [`load`].
pub fn read(directory: &Path) -> Result<(ModelConfig, Vec<f32>), Error> {
    let config = read_config(&directory.join(CONFIG))?;
    let list = ParameterList::of(&config);
    let values = open(directory, &list)?.read(0, &[list.range()])?;
    Ok((config, values))
}

/// The parameters in `directory`, in one file or in those of the ranks of a run.
pub(crate) fn open(directory: &Path, list: &ParameterList) -> Result<Store, Error> {
    Store::open(tensor_files(directory, MODEL, WEIGHTS)?, list, &[""])
}

/// Writes the model in `from` to `directory` in the published layout, as [`save`] does, in float32: piece by piece, so that
/// a model of any size takes a few megabytes of memory.
///
/// # Errors
/// As [`load`] and [`save`].
pub fn copy(from: &Path, directory: &Path, tokenizer: Option<&Path>) -> Result<(), Error> {
    let config = read_config(&from.join(CONFIG))?;
    let list = ParameterList::of(&config);
    let store = open(from, &list)?;
    write_from(&config, &store, directory, tokenizer)
}

/// Writes `model` to `directory`, which is made when it is not there, and copies the tokenizer
/// beside it when one is given. [`load`] gives the same model back, bit for bit.
///
/// # Errors
/// [`Error::Io`] with the file that cannot be written.
pub fn save(model: &Model, directory: &Path, tokenizer: Option<&Path>) -> Result<(), Error> {
    write(model.config(), &model.values(), directory, tokenizer)
}

/// [`save`] of the parameters in the order of the parameter list.
pub(crate) fn write(
    config: &ModelConfig,
    values: &[f32],
    directory: &Path,
    tokenizer: Option<&Path>,
) -> Result<(), Error> {
    let ranges = [ParameterList::of(config).range()];
    write_from(config, &Shard { ranges: &ranges, values }, directory, tokenizer)
}

fn write_from(
    config: &ModelConfig,
    values: &dyn tensors::Values,
    directory: &Path,
    tokenizer: Option<&Path>,
) -> Result<(), Error> {
    let list = ParameterList::of(config);
    let ranges = [list.range()];
    write_description(config, directory, tokenizer)?;
    files::replace(&directory.join(MODEL), |path| tensors::write(path, &list, &ranges, &[("", values)]))
}

/// What is beside the parameters: the sizes, and a tokenizer where one is given. Makes the directory where it is not.
pub(crate) fn write_description(config: &ModelConfig, directory: &Path, tokenizer: Option<&Path>) -> Result<(), Error> {
    fs::create_dir_all(directory).map_err(Error::io(directory))?;
    if let Some(from) = tokenizer {
        files::replace(&directory.join(TOKENIZER), |path| fs::copy(from, path).map(drop).map_err(Error::io(from)))?;
    }
    files::replace(&directory.join(CONFIG), |path| fs::write(path, config_json(config)).map_err(Error::io(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Model {
        Model::new(&ModelConfig::smallest(), 3, &Device::flex()).unwrap()
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let tokenizer = directory.path().join("tokens");
        fs::write(&tokenizer, "{}").unwrap();
        let target = directory.path().join("model");
        let model = tiny();
        save(&model, &target, Some(&tokenizer)).unwrap();
        let loaded = load(&target, &Device::flex()).unwrap();
        assert_eq!(loaded.config(), model.config());
        assert_eq!(loaded.values(), model.values());
        let mut names: Vec<_> = fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [CONFIG, MODEL, TOKENIZER]);
        let mode = |name: &str| fs::metadata(target.join(name)).unwrap().permissions();
        assert_eq!(mode(MODEL), mode(CONFIG), "weights are as readable as any other file");
    }

    #[test]
    fn another_model_is_refused_with_file_and_reason() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        save(&tiny(), path, None).unwrap();
        let text = fs::read_to_string(path.join(CONFIG)).unwrap();
        let load_with = |from: &str, to: &str| {
            assert!(text.contains(from));
            fs::write(path.join(CONFIG), text.replace(from, to)).unwrap();
            load(path, &Device::flex()).unwrap_err().to_string()
        };
        for (from, to, reason) in [
            ("\"transnormer\"", "\"llama\"", "model_type is \"llama\""),
            ("\"bias\": false", "\"bias\": true", "bias is true"),
            ("\"glu_dim\": 12", "\"glu_dim\": 13", "l1.weight is [12, 8]"),
            ("\"decoder_layers\": 2", "\"decoder_layers\": 3", "linear_use_lrpe_list"),
            ("\"hidden_dim\": 8,", "", "hidden_dim"),
        ] {
            let error = load_with(from, to);
            assert!(error.contains(reason), "{error}");
        }
        fs::write(path.join(CONFIG), text.replace('{', "{\"use_cache\": true,")).unwrap();
        load(path, &Device::flex()).unwrap();
        fs::write(path.join(MODEL), b"short").unwrap();
        let error = load(path, &Device::flex()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors: "), "{error}");
    }
}
