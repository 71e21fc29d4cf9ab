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
    /// Where its values lie in the flat buffer of the whole model, which is another one where ranks share the blocks.
    pub place: Place,
}

/// Values of a parameter of the whole model: runs of one length, at equal distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The first value of the whole parameter in the flat buffer.
    pub begin: usize,
    /// The first of these values, counted from there.
    pub first: usize,
    /// Values of a run.
    pub run: usize,
    /// Values from the beginning of one run to that of the next; those of a run where these are all.
    pub stride: usize,
}

impl Place {
    /// Whether these are all values of the parameter.
    pub fn is_whole(&self) -> bool {
        self.run == self.stride
    }

    /// The values `part`, counted from the first of these, as ranges of the flat buffer.
    pub fn ranges(self, part: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut next = part.start;
        std::iter::from_fn(move || {
            if next >= part.end {
                return None;
            }
            let (row, column) = (next / self.run, next % self.run);
            let count = (self.run - column).min(part.end - next);
            next += count;
            let begin = self.begin + self.first + row * self.stride + column;
            Some(begin..begin + count)
        })
    }
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

/// How ranks share a parameter.
enum Cut {
    /// Each has all of it.
    Whole,
    /// Each has a part of every one of so many equal runs of values: of the rows of a matrix, of its columns (a run is a
    /// row), or of the rows of q, k, v and u.
    Runs(usize),
}

impl ParameterList {
    /// The parameters of a model of these sizes.
    pub fn of(config: &ModelConfig) -> Self {
        Self::part(config, 0, 1)
    }

    /// What rank `rank` has of a model of these sizes when `world` ranks share its blocks, as [`ModelConfig::part`] allows: of
    /// every block a part, of embedding and head all. The flat buffer is that of this part.
    pub fn part(config: &ModelConfig, rank: usize, world: usize) -> Self {
        let mut list = Self { parameters: Vec::new(), blocks: Vec::new(), total: 0 };
        let (d, e, g) = (config.decoder_embed_dim, config.hidden_dim / world, config.glu_dim / world);
        let heads = config.decoder_attention_heads / world;
        let mut begin = 0;
        let mut push = |list: &mut Self, name: &str, shape: &[usize], cut: Cut| {
            let count: usize = shape.iter().product();
            let (place, whole) = match cut {
                Cut::Runs(runs) if world > 1 => {
                    let run = count / runs;
                    (Place { begin, first: rank * run, run, stride: world * run }, world * count)
                }
                _ => (Place { begin, first: 0, run: count, stride: count }, count),
            };
            begin += whole;
            list.parameters.push(Parameter { name: name.to_owned(), shape: shape.to_vec(), offset: list.total, place });
            list.total += count;
        };
        push(&mut list, "model.embed_tokens.weight", &[config.vocab_size, d], Cut::Whole);
        list.end_block();
        for layer in 0..config.decoder_layers {
            let mixer = format!("model.layers.{layer}.token_mixer");
            push(&mut list, &format!("{mixer}.qkvu_proj.weight"), &[4 * e, d], Cut::Runs(4));
            push(&mut list, &format!("{mixer}.out_proj.weight"), &[d, e], Cut::Runs(d));
            if config.uses_lrpe(layer) {
                push(&mut list, &format!("{mixer}.lrpe.theta"), &[heads, 1, e / heads], Cut::Runs(1));
            }
            let mixer = format!("model.layers.{layer}.channel_mixer");
            push(&mut list, &format!("{mixer}.l1.weight"), &[g, d], Cut::Runs(1));
            push(&mut list, &format!("{mixer}.l2.weight"), &[g, d], Cut::Runs(1));
            push(&mut list, &format!("{mixer}.l3.weight"), &[d, g], Cut::Runs(d));
            list.end_block();
        }
        push(&mut list, "lm_head.weight", &[config.vocab_size, d], Cut::Whole);
        list.end_block();
        list
    }

    /// Makes a block of what was pushed since the last one.
    fn end_block(&mut self) {
        let begin = self.blocks.last().map_or(0, |block| block.end);
        self.blocks.push(begin..self.parameters.len());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_any_number_of_ranks_hold_every_value_of_a_block_once() {
        let config = ModelConfig {
            vocab_size: 30,
            decoder_embed_dim: 6,
            decoder_layers: 2,
            decoder_attention_heads: 4,
            hidden_dim: 12,
            glu_dim: 8,
            linear_use_lrpe_list: vec![1, 0],
            ..ModelConfig::default()
        };
        let whole = ParameterList::of(&config);
        for world in [1, 2, 4] {
            let mut holders = vec![0; whole.total()];
            for rank in 0..world {
                let part = ParameterList::part(&config, rank, world);
                assert_eq!(part.iter().len(), whole.iter().len());
                for (own, all) in part.iter().zip(whole.iter()) {
                    let count = own.range().len();
                    let ranges: Vec<Range<usize>> = own.place.ranges(0..count).collect();
                    assert_eq!(ranges.iter().map(Range::len).sum::<usize>(), count);
                    assert_eq!((&own.name, own.place.begin), (&all.name, all.offset));
                    let tables = all.name.contains("embed") || all.name.contains("head");
                    assert_eq!(own.place.is_whole(), tables || world == 1);
                    // Parts of parts go on where the part before ends.
                    let apart: Vec<usize> = [0..count / 3, count / 3..count]
                        .into_iter()
                        .flat_map(|p| own.place.ranges(p))
                        .flatten()
                        .collect();
                    assert_eq!(apart, ranges.iter().cloned().flatten().collect::<Vec<_>>());
                    if !tables || rank == 0 {
                        ranges.into_iter().flatten().for_each(|at| holders[at] += 1);
                    }
                }
            }
            assert!(holders.iter().all(|&count| count == 1), "{world}");
        }
        // Of two ranks the second has the last two heads of q, k, v and u, and the second half of each row of the output.
        let part = ParameterList::part(&config, 1, 2);
        let [qkvu, out, theta] = [1, 2, 3].map(|n| part.iter().as_slice()[n].clone());
        let rows: Vec<usize> = qkvu.place.ranges(0..144).map(|range| (range.start - 180) / 6).collect();
        assert_eq!((rows, qkvu.shape), (vec![6, 18, 30, 42], vec![24, 6]));
        assert_eq!(out.place.ranges(0..12).collect::<Vec<_>>(), [474..480, 486..492]);
        assert_eq!((theta.place.first, theta.shape), (6, vec![2, 1, 3]));
    }
}
