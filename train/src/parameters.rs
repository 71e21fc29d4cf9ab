//! The flat, ordered, named list of a model's parameters. Everything that treats all parameters
//! alike (optimizer, clipping, checkpoint, export) sees the model through this list.

use std::ops::Range;

use crate::config::ModelConfig;

/// One parameter: a named range of the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Name in a published checkpoint.
    pub name: String,
    /// Shape in a published checkpoint; matrices are `[out, in]`.
    pub shape: Vec<usize>,
    /// First value in the flat buffer.
    pub offset: usize,
}

impl Parameter {
    /// Its values in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.shape.iter().product::<usize>()
    }

    /// Whether weight decay applies: matrices decay, the angles of LRPE do not.
    pub fn decays(&self) -> bool {
        self.shape.len() == 2
    }

    /// The shape as a matrix: angles `[H, 1, K]` become `[H, K]`.
    pub fn matrix(&self) -> [usize; 2] {
        let last = self.shape[self.shape.len() - 1];
        [self.shape.iter().product::<usize>() / last, last]
    }
}

/// All parameters, block after block: embedding, layers, output head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterList {
    parameters: Vec<Parameter>,
    blocks: Vec<Range<usize>>,
    total: usize,
}

impl ParameterList {
    /// The parameters of a model of these sizes.
    pub fn of(config: &ModelConfig) -> Self {
        let mut list = Self { parameters: Vec::new(), blocks: Vec::new(), total: 0 };
        let (d, e, g) = (config.decoder_embed_dim, config.hidden_dim, config.glu_dim);
        let heads = config.decoder_attention_heads;
        list.push("model.embed_tokens.weight", &[config.vocab_size, d]);
        list.end_block();
        for layer in 0..config.decoder_layers {
            let mixer = format!("model.layers.{layer}.token_mixer");
            list.push(&format!("{mixer}.qkvu_proj.weight"), &[4 * e, d]);
            list.push(&format!("{mixer}.out_proj.weight"), &[d, e]);
            if config.uses_lrpe(layer) {
                list.push(&format!("{mixer}.lrpe.theta"), &[heads, 1, e / heads]);
            }
            let mixer = format!("model.layers.{layer}.channel_mixer");
            list.push(&format!("{mixer}.l1.weight"), &[g, d]);
            list.push(&format!("{mixer}.l2.weight"), &[g, d]);
            list.push(&format!("{mixer}.l3.weight"), &[d, g]);
            list.end_block();
        }
        list.push("lm_head.weight", &[config.vocab_size, d]);
        list.end_block();
        list
    }

    /// Makes a block of what was pushed since the last one.
    fn end_block(&mut self) {
        let begin = self.blocks.last().map_or(0, |block| block.end);
        self.blocks.push(begin..self.parameters.len());
    }

    fn push(&mut self, name: &str, shape: &[usize]) {
        self.parameters.push(Parameter { name: name.to_owned(), shape: shape.to_vec(), offset: self.total });
        self.total += shape.iter().product::<usize>();
    }

    /// The numbers of the parameters of the embedding, of each layer and of the head.
    pub fn blocks(&self) -> &[Range<usize>] {
        &self.blocks
    }

    /// All of the flat buffer.
    pub fn range(&self) -> Range<usize> {
        0..self.total
    }

    /// Length of the flat buffer.
    pub fn total(&self) -> usize {
        self.total
    }

    /// The parameters in the order of the flat buffer.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.parameters.iter()
    }
}
