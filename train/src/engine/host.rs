//! The step in float32 on the CPU, block by block, of one rank or of many.
//!
//! Every half of a block has a tape of its own, which begins with the stream before it and ends with the one after; so weights
//! are needed, and gradients ready, one block at a time, and between the tapes ranks that share the blocks make one
//! stream of their parts ([`super::join`]). A rank that has only its part of the weights gathers those of
//! a block when it is its turn, the next ones meanwhile, and makes the block again in the backward, where it gathers
//! them once more, rather than keep them. Sums of gradients over micro batches and ranks are one [`Tree`], the norm is
//! one sum over chunks: the same bits for every mode, and for every number of ranks that have the same power of two of
//! micro batches each.

use std::cell::Cell;
use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::{Device, Tensor, TensorData};

use super::join::{self, Joined, add_up};
use super::{Engine, Outcome, Pending, Snapshot};
use crate::batch::Rows;
use crate::config::{Sharding, TrainConfig};
use crate::generate::{ModelReader, Reader};
use crate::model::{Before, Block, Mixture, Network, check_ids, gradient_of, read, views};
use crate::ops::cpu;
use crate::ops::embedding::gradient_on_cpu;
use crate::optimizer::{Factors, square_sums};
use crate::parallel::{Alone, CHUNK, Collective, Partition, Pending as Arriving, Relay, Team, Tree, share};
use crate::parameters::{Parameter, ParameterList};
use crate::tensors::floats;
use crate::{Batch, Error, Model};

/// What a rank holds of a model, and what became of its last step.
pub(super) struct Host {
    config: TrainConfig,
    network: Network,
    partition: Partition,
    team: Team,
    sharding: Sharding,
    device: Device,
    /// By bucket.
    weights: Vec<Held>,
    /// By bucket, first and second: of all its values without sharding, else of the piece of this rank.
    moments: Vec<[Vec<f32>; 2]>,
    /// Steps taken.
    taken: u64,
    outcome: Outcome,
    /// Bytes of weights, gradients and moments at the fullest moment of the last step that was looked at.
    fullest: Cell<usize>,
}

/// The weights of one bucket. There are a few dozen of them.
#[allow(clippy::large_enum_variant)]
enum Held {
    Whole(Tensor<1>),
    /// The piece of this rank.
    Piece(Vec<f32>),
}

/// The weights of a bucket, or their arrival. There is one at a time.
#[allow(clippy::large_enum_variant)]
enum Fetch {
    Here(Tensor<1>),
    Coming(Arriving),
}

/// What the backward of a block begins with. There is one of each block.
#[allow(clippy::large_enum_variant)]
enum Kept {
    Tapes(Box<Tapes>),
    Input(Input),
}

/// What a block is made of, besides its weights.
struct Input {
    /// The stream before the block.
    x: Tensor<2>,
    /// The state before the tokens of this rank, where ranks share rows.
    state: Option<Tensor<4>>,
    /// What ranks that share the block have made together, where it is made once more: nothing is sent again.
    joined: Option<Joined>,
}

/// What a block is made for.
#[derive(Clone, Copy)]
struct Pass<'a> {
    rows: &'a Rows,
    /// Whether there will be a backward.
    tracked: bool,
    /// Whether the rows are parts of rows, with a state before and after.
    parts: bool,
}

/// The forward of a block but for its last sum, on two tapes where it is tracked: from the stream before it to what its token
/// mixer makes, and from the stream after that to what its channel mixer makes.
struct Tapes {
    block: Block,
    x: Tensor<2>,
    before: Option<Tensor<4>>,
    mixture: Mixture,
    joined: Joined,
    middle: Tensor<2>,
    out: Tensor<2>,
}

/// The gradient of a bucket on its way through a step.
enum Gradient {
    /// Of the micro batches so far.
    Sum(Tree),
    /// Over the ranks, for the piece of this one, which has this many values.
    Coming(Arriving, usize),
    /// The same, arrived.
    Here(Vec<f32>),
}

/// The gradients of all buckets.
struct Gradients {
    of: Vec<Gradient>,
    /// The bucket that is on its way. What came of others is in memory until it is waited for, so there is one at a time.
    coming: Option<usize>,
}

impl Gradients {
    /// Waits for what is on its way.
    fn land(&mut self) -> Result<(), Error> {
        let Some(bucket) = self.coming.take() else { return Ok(()) };
        match std::mem::replace(&mut self.of[bucket], Gradient::Here(Vec::new())) {
            Gradient::Coming(coming, _) => self.of[bucket] = Gradient::Here(coming()?),
            other => self.of[bucket] = other,
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        let of = |gradient: &Gradient| match gradient {
            Gradient::Sum(tree) => tree.bytes(),
            Gradient::Coming(_, values) => 4 * values,
            Gradient::Here(values) => 4 * values.capacity(),
        };
        self.of.iter().map(of).sum()
    }
}

impl Host {
    pub(super) fn new(config: &TrainConfig, device: &Device, team: Team, snapshot: Snapshot) -> Result<Self, Error> {
        config.model.validate()?;
        let Snapshot { values, first, second, taken, skipped } = snapshot;
        let partition = team.partition(config);
        // One rank has everything whatever is shared.
        let sharding = if team.inner.world() == 1 { Sharding::None } else { config.sharding };
        let mut host = Self {
            network: Network::part(&config.model, team.tensor.rank(), team.tensor.world())?,
            config: config.clone(),
            team,
            sharding,
            device: device.clone(),
            weights: Vec::new(),
            moments: Vec::new(),
            taken,
            outcome: Outcome { loss: f64::NAN, grad_norm: f64::NAN, skipped, skipped_last: 0 },
            fullest: Cell::new(0),
            partition,
        };
        let mut begin = 0;
        for bucket in 0..host.partition.buckets().len() {
            let range = begin..begin + host.piece(bucket).len();
            begin = range.end;
            let piece = &values[range.clone()];
            host.weights.push(match sharding {
                Sharding::Full => Held::Piece(piece.to_vec()),
                _ => Held::Whole(host.tensor(host.gather(bucket, piece.to_vec())?()?)),
            });
            let moments = [&first[range.clone()], &second[range]];
            host.moments.push(match sharding {
                Sharding::None => {
                    let [first, second] = moments.map(|moment| host.gather(bucket, moment.to_vec()));
                    [first?()?, second?()?]
                }
                _ => moments.map(<[f32]>::to_vec),
            });
        }
        Ok(host)
    }

    /// What this rank has of a bucket.
    fn piece(&self, bucket: usize) -> Range<usize> {
        self.partition.piece(bucket, self.team.inner.rank())
    }

    /// Puts the pieces of a bucket together, of which this rank has `own`.
    fn gather(&self, bucket: usize, own: Vec<f32>) -> Result<Arriving, Error> {
        self.team.inner.all_gather(own, &self.partition.pieces(bucket))
    }

    /// Looks at how many bytes of weights, gradients and moments there are, `more` of them in none of the buffers of this
    /// engine; what other ranks have sent, or will be sent, counts.
    fn look(&self, more: usize) {
        let weights = self.weights.iter().map(|held| match held {
            Held::Whole(weights) => 4 * weights.dims()[0],
            Held::Piece(piece) => 4 * piece.capacity(),
        });
        let moments = self.moments.iter().flatten().map(|moments| 4 * moments.capacity());
        let on_their_way = self.team.all.bytes_held() as usize;
        self.fullest.set(self.fullest.get().max(weights.chain(moments).sum::<usize>() + on_their_way + more));
    }

    fn tensor(&self, values: Vec<f32>) -> Tensor<1> {
        let shape = [values.len()];
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    fn last(&self) -> usize {
        self.partition.buckets().len() - 1
    }

    fn layers(&self) -> usize {
        self.config.model.decoder_layers
    }

    fn parameters(&self, bucket: usize) -> &[Parameter] {
        &self.partition.parameters().iter().as_slice()[self.partition.buckets()[bucket].parameters.clone()]
    }

    /// The matrices of a bucket whose values are `weights`.
    fn views(&self, bucket: usize, weights: &Tensor<1>, tracked: bool) -> Vec<Tensor<2>> {
        views(weights, self.parameters(bucket), self.partition.buckets()[bucket].range.start, tracked)
    }

    /// The one matrix of the embedding or the head.
    fn matrix(&self, bucket: usize, weights: &Tensor<1>, tracked: bool) -> Tensor<2> {
        let matrix = self.views(bucket, weights, tracked).pop();
        matrix.unwrap_or_else(|| unreachable!("the bucket has a matrix"))
    }

    fn block(&self, layer: usize, weights: &Tensor<1>, tracked: bool) -> Block {
        let mut views = self.views(layer + 1, weights, tracked).into_iter();
        Block::next(&mut views, self.config.model.uses_lrpe(layer))
    }

    fn fetch(&self, bucket: usize) -> Result<Fetch, Error> {
        Ok(match &self.weights[bucket] {
            Held::Whole(weights) => Fetch::Here(weights.clone()),
            Held::Piece(piece) => Fetch::Coming(self.gather(bucket, piece.clone())?),
        })
    }

    /// The weights of the buckets `order`, one after the other.
    fn gathers(&self, order: Vec<usize>) -> Result<Gathers<'_>, Error> {
        let mut order = order.into_iter();
        let ahead = order.next().map(|bucket| self.fetch(bucket)).transpose()?;
        Ok(Gathers { host: self, order, ahead, sums: 0 })
    }

    fn parts(&self, batch: &Batch) -> Result<Vec<Rows>, Error> {
        check_ids(&batch.tokens, self.config.model.vocab_size)?;
        batch.split(self.config.batch)
    }

    /// Whether this rank has a part of the tokens of its rows.
    fn shares_rows(&self) -> bool {
        self.team.sequence.world() > 1
    }

    /// Of whole rows what this rank computes.
    fn own_tokens(&self, parts: Vec<Rows>) -> Vec<Rows> {
        if !self.shares_rows() {
            return parts;
        }
        let sequence = &self.team.sequence;
        let tokens = share(self.config.sequence_length, sequence.rank(), sequence.world());
        parts.iter().map(|rows| rows.part(tokens.clone())).collect()
    }

    /// The way of a layer's state from rank to rank, or of its gradient back.
    fn relay(&self, layer: usize, rows: Option<&Rows>, backwards: bool) -> Result<Relay, Error> {
        if !self.shares_rows() {
            return Alone.relay(0, backwards);
        }
        let shape = self.network.state_shape(layer, rows.map_or(0, |rows| rows.sequences.rows()));
        self.team.sequence.relay(shape.iter().product(), backwards)
    }

    /// What came from the rank before, where there is one.
    fn state(&self, layer: usize, rows: &Rows, receive: Arriving) -> Result<Option<Tensor<4>>, Error> {
        let values = receive()?;
        let shape = self.network.state_shape(layer, rows.sequences.rows());
        Ok((!values.is_empty()).then(|| Tensor::from_data(TensorData::new(values, shape), &self.device)))
    }

    /// Goes along with the sums that others make of a block, in its forward or its backward, for rows that this rank does not
    /// have.
    fn pass_by(&self) -> Result<(), Error> {
        join::nothing(self.team.tensor.as_ref())?;
        join::nothing(self.team.tensor.as_ref())
    }

    /// Whether the backward gathers the weights of a block anew.
    fn gathers_again(&self) -> bool {
        self.sharding == Sharding::Full
    }

    /// The gradients of all buckets over all ranks, each for the piece of this one, and the losses of this rank's micro
    /// batches. Ranks with fewer micro batches than `most` go along with the others' gathering.
    fn accumulate(&self, parts: &[Rows], counted: u64, most: usize) -> Result<(Vec<Vec<f32>>, Vec<f32>), Error> {
        let buckets = self.partition.buckets().len();
        let of = (0..buckets).map(|_| Gradient::Sum(Tree::default())).collect();
        let mut gradients = Gradients { of, coming: None };
        let mut losses = Vec::with_capacity(parts.len());
        for index in 0..most {
            let last = index + 1 == most;
            let rows = parts.get(index);
            let share = rows.map_or(0.0, |rows| rows.counted() as f64 / counted.max(1) as f64);
            losses.extend(self.part(rows, share, last, &mut gradients)?);
        }
        for bucket in 0..buckets {
            self.reduce(bucket, &mut gradients)?;
        }
        gradients.land()?;
        let pieces = gradients.of.into_iter().map(|gradient| match gradient {
            Gradient::Here(piece) => piece,
            _ => unreachable!("all were reduced, and have landed"),
        });
        Ok((pieces.collect(), losses))
    }

    /// Puts the sum of a bucket over the ranks on its way, where it is not, and waits for the one before.
    fn reduce(&self, bucket: usize, gradients: &mut Gradients) -> Result<(), Error> {
        let Gradient::Sum(tree) = &mut gradients.of[bucket] else { return Ok(()) };
        let values = std::mem::take(tree).finish();
        let values = values.unwrap_or_else(|| vec![0.0; self.partition.buckets()[bucket].len()]);
        let pieces = self.partition.pieces(bucket);
        let coming = self.team.inner.reduce_scatter(values, &pieces)?;
        gradients.of[bucket] = Gradient::Coming(coming, self.piece(bucket).len());
        self.look(gradients.bytes());
        gradients.land()?;
        gradients.coming = Some(bucket);
        Ok(())
    }

    /// Adds gradients of a bucket, and sends the sum on its way where no more come and it need not be kept.
    fn add(
        &self,
        bucket: usize,
        gradients: Option<Vec<Tensor<2>>>,
        last: bool,
        sums: &mut Gradients,
    ) -> Result<(), Error> {
        if let Some(gradients) = gradients {
            let count = self.partition.buckets()[bucket].len();
            // As they were made, and once more one after the other.
            self.look(sums.bytes() + 2 * 4 * count);
            let Gradient::Sum(tree) = &mut sums.of[bucket] else { unreachable!("no gradient comes after the last") };
            tree.push(flatten(gradients, count));
        }
        if last && self.sharding != Sharding::Optimizer { self.reduce(bucket, sums) } else { Ok(()) }
    }

    /// Forward and backward of one micro batch, whose loss counts `share`; without rows only what other ranks need.
    fn part(&self, rows: Option<&Rows>, share: f64, last: bool, sums: &mut Gradients) -> Result<Option<f32>, Error> {
        let (layers, head) = (self.layers(), self.last());
        let mut order: Vec<usize> = (0..=head).collect();
        if self.gathers_again() {
            order.extend((1..head).rev());
        }
        let mut gathers = self.gathers(order)?;
        gathers.sums = sums.bytes();

        let table = gathers.next()?;
        let mut x = rows.map(|rows| self.network.embed(&self.matrix(0, &table, false), &rows.inputs));
        drop(table);
        let mut kept = Vec::with_capacity(layers);
        for layer in 0..layers {
            let weights = gathers.next()?;
            let Relay { receive, send } = self.relay(layer, rows, false)?;
            let (Some(rows), Some(before)) = (rows, x.take()) else {
                self.pass_by()?;
                continue;
            };
            let state = self.state(layer, rows, receive)?;
            let pass = Pass { rows, tracked: !self.gathers_again(), parts: self.shares_rows() };
            let input = Input { x: before.clone(), state: state.clone(), joined: None };
            let tapes = self.tapes(layer, &weights, input, pass, send)?;
            x = Some(self.after(&tapes)?);
            kept.push(match pass.tracked {
                true => Kept::Tapes(Box::new(tapes)),
                false => {
                    let joined = (self.team.tensor.world() > 1).then_some(tapes.joined);
                    Kept::Input(Input { x: before, state, joined })
                }
            });
        }

        let weights = gathers.next()?;
        let (mut loss, mut dx, mut of_head): (Option<f32>, _, _) = (None, None, None);
        if let (Some(rows), Some(x)) = (rows, x) {
            let (x, matrix) = (x.autodiff().require_grad(), self.matrix(head, &weights, true));
            let value = self.network.loss(&matrix, x.clone(), &rows.targets, self.config.z_loss) * share;
            let mut gradients = value.backward();
            loss = Some(value.inner().into_scalar());
            dx = Some(gradient_of(&x, &mut gradients));
            of_head = Some(vec![gradient_of(&matrix, &mut gradients)]);
        }
        drop(weights);
        self.add(head, of_head, last, sums)?;

        for layer in (0..layers).rev() {
            gathers.sums = sums.bytes();
            let weights = if self.gathers_again() { Some(gathers.next()?) } else { None };
            let Relay { receive, send } = self.relay(layer, rows, true)?;
            let mut of_block = None;
            if let (Some(rows), Some(dy), Some(kept)) = (rows, dx.take(), kept.pop()) {
                let tapes = match (kept, weights) {
                    (Kept::Input(input), Some(weights)) => {
                        let pass = Pass { rows, tracked: true, parts: self.shares_rows() };
                        self.tapes(layer, &weights, input, pass, Box::new(drop))?
                    }
                    (Kept::Tapes(tapes), _) => *tapes,
                    (Kept::Input(_), None) => unreachable!("what is made again has its weights"),
                };
                let d_after = || self.state(layer, rows, receive);
                let (d_before, gradients) = self.backward(tapes, dy, d_after, send)?;
                (dx, of_block) = (Some(d_before), Some(gradients));
            } else {
                self.pass_by()?;
            }
            self.add(layer + 1, of_block, last, sums)?;
        }
        let of_table = rows.zip(dx).map(|(rows, dx)| {
            vec![gradient_on_cpu(dx, &rows.inputs, self.config.model.vocab_size, self.network.scale())]
        });
        self.add(0, of_table, last, sums)?;
        Ok(loss)
    }

    /// The forward of a block; `send` gets the state after the tokens of this rank.
    fn tapes(
        &self,
        layer: usize,
        weights: &Tensor<1>,
        input: Input,
        pass: Pass<'_>,
        send: Box<dyn FnOnce(Vec<f32>) + Send>,
    ) -> Result<Tapes, Error> {
        let Pass { rows, tracked, parts } = pass;
        let block = self.block(layer, weights, tracked);
        let x = leaf(input.x.clone(), tracked);
        let before = input.state.map(|state| leaf(state, tracked));
        let of_rows = if parts { Before::Tokens(before.clone()) } else { Before::Nothing };
        let mixture = self.network.mixer(layer, &block, x.clone(), &rows.sequences, of_rows);
        send(mixture.after.clone().map_or(Vec::new(), |state| read(plain(state))));
        let joined = match input.joined {
            Some(joined) => joined,
            None => {
                let (out, squares) = (plain(mixture.out.clone()), mixture.squares.clone().map(plain));
                Joined::new(self.team.tensor.as_ref(), out, squares, self.config.model.hidden_dim)?
            }
        };
        let middle = leaf(joined.added_to(input.x), tracked);
        let out = self.network.channels(&block, middle.clone());
        Ok(Tapes { block, x, before, mixture, joined, middle, out })
    }

    /// The stream after a block.
    fn after(&self, tapes: &Tapes) -> Result<Tensor<2>, Error> {
        join::sum(self.team.tensor.as_ref(), plain(tapes.middle.clone()), plain(tapes.out.clone()))
    }

    /// The gradients of the stream before a block and of its weights, from `dy` of the stream after it, and `d_after` of the
    /// state where a rank after this one has used it; `send` gets that of the state before.
    fn backward(
        &self,
        tapes: Tapes,
        dy: Tensor<2>,
        d_after: impl FnOnce() -> Result<Option<Tensor<4>>, Error>,
        send: Box<dyn FnOnce(Vec<f32>) + Send>,
    ) -> Result<(Tensor<2>, Vec<Tensor<2>>), Error> {
        let Tapes { block, x, before, mixture, joined, middle, out } = tapes;
        // The gradient of these sums with respect to what is multiplied by a gradient is just that.
        let mut gradients = (out * dy.clone()).sum().backward();
        let d_middle = gradient_of(&middle, &mut gradients);
        let of_channels: Vec<_> = block.of_channels().map(|leaf| gradient_of(leaf, &mut gradients)).collect();
        let dy = join::sum(self.team.tensor.as_ref(), dy, d_middle)?;

        let (d_out, d_squares) = joined.backward(&dy);
        let mut sum = (mixture.out * d_out).sum();
        if let Some((squares, d_squares)) = mixture.squares.zip(d_squares) {
            sum = sum + (squares * d_squares).sum();
        }
        if let Some((after, d_after)) = mixture.after.zip(d_after()?) {
            sum = sum + (after * d_after).sum();
        }
        let mut gradients = sum.backward();
        send(before.map_or(Vec::new(), |state| read(gradient_of(&state, &mut gradients))));
        let d_x = gradient_of(&x, &mut gradients);
        let of_mixer = block.of_mixer().map(|leaf| gradient_of(leaf, &mut gradients));
        let weights = of_mixer.chain(of_channels).collect();
        Ok((join::sum(self.team.tensor.as_ref(), dy, d_x)?, weights))
    }

    /// The norm of the gradient, of which this rank has `pieces`: the sums of squares of all chunks, added in the order of
    /// the flat buffer, in a block part by part. What ranks that share blocks all have counts once.
    fn norm(&self, pieces: &[Vec<f32>]) -> Result<f64, Error> {
        let own = pieces.iter().flat_map(|piece| square_sums(piece));
        let own: Vec<u8> = own.flat_map(f64::to_le_bytes).collect();
        let all = self.team.copy.exchange(&own)?;
        let parts = self.team.tensor.world();
        let mut sums: Vec<_> =
            all.iter().map(|bytes| bytes.as_chunks::<8>().0.iter().map(|sum| f64::from_le_bytes(*sum))).collect();
        let mut total = 0.0;
        // Bucket by bucket, in each rank by rank of those that have the same part.
        for bucket in 0..pieces.len() {
            for part in 0..parts {
                let counts = part == 0 || self.partition.is_split(bucket);
                for (rank, sums) in sums.iter_mut().skip(part).step_by(parts).enumerate() {
                    let count = self.partition.piece(bucket, rank).len().div_ceil(CHUNK);
                    let sum = sums.by_ref().take(count);
                    // What does not count is passed over.
                    sum.for_each(|sum| total += if counts { sum } else { 0.0 });
                }
            }
        }
        Ok(total.sqrt())
    }

    /// The losses of all micro batches of all ranks, in order, of which this rank has `own`.
    fn losses(&self, own: &[f32]) -> Result<Vec<f64>, Error> {
        let own: Vec<u8> = own.iter().flat_map(|loss| loss.to_le_bytes()).collect();
        let all: Vec<Vec<u8>> = self.team.of_places(self.team.all.exchange(&own)?).collect();
        Ok(floats(&all.concat()).into_iter().map(f64::from).collect())
    }

    /// Adds to the pieces of this rank those of the ranks that have the same shard.
    fn add_copies(&self, pieces: Vec<Vec<f32>>) -> Result<Vec<Vec<f32>>, Error> {
        let outer = &self.team.outer;
        if outer.world() == 1 {
            return Ok(pieces);
        }
        pieces.into_iter().map(|piece| add_up(outer.as_ref(), piece)).collect()
    }

    /// Takes the step with the gradients of this rank's pieces.
    fn update(&mut self, gradients: Vec<Vec<f32>>, factors: &Factors) -> Result<(), Error> {
        let mut left: usize = gradients.iter().map(|piece| 4 * piece.capacity()).sum();
        let mut gradients = gradients.into_iter().enumerate();
        if self.sharding == Sharding::None {
            // The rest of the sum, to take the whole step: the next bucket is on its way while one is updated.
            let mut next = |host: &Self| {
                gradients
                    .next()
                    .map(|(bucket, piece)| Ok::<_, Error>((bucket, host.gather(bucket, piece)?)))
                    .transpose()
            };
            let mut ahead = next(self)?;
            while let Some((bucket, gradient)) = ahead {
                ahead = next(self)?;
                let gradient = gradient()?;
                left -= 4 * self.piece(bucket).len();
                self.look(left + 4 * gradient.capacity());
                let Held::Whole(weights) = &mut self.weights[bucket] else { unreachable!("nothing is sharded") };
                let buffer = weights.extract().try_into_primitive::<Flex>();
                let mut buffer = buffer.unwrap_or_else(|error| unreachable!("{error:?}"));
                let range = self.partition.buckets()[bucket].range.clone();
                let moments = &mut self.moments[bucket];
                step(&self.partition, &range, buffer.storage_mut::<f32>(), moments, &gradient, factors);
                *weights = Tensor::from_primitive::<Flex>(buffer);
            }
            return Ok(());
        }
        // Old and new weights of one bucket are there at once, not of all.
        let mut coming: Option<(usize, Arriving)> = None;
        for (bucket, gradient) in gradients {
            let (begin, piece) = (self.partition.buckets()[bucket].range.start, self.piece(bucket));
            let range = begin + piece.start..begin + piece.end;
            let moments = &mut self.moments[bucket];
            match &mut self.weights[bucket] {
                Held::Piece(values) => step(&self.partition, &range, values, moments, &gradient, factors),
                Held::Whole(weights) => {
                    let mut values = cut(weights, piece);
                    step(&self.partition, &range, &mut values, moments, &gradient, factors);
                    let next = (bucket, self.gather(bucket, values)?);
                    self.arrive(coming.replace(next), left)?;
                }
            }
            left -= 4 * gradient.capacity();
        }
        self.arrive(coming, left)
    }

    /// Takes over the weights of a bucket that are on their way, while `left` bytes of gradients are there.
    fn arrive(&mut self, coming: Option<(usize, Arriving)>, left: usize) -> Result<(), Error> {
        let Some((bucket, values)) = coming else { return Ok(()) };
        let values = values()?;
        self.look(left + 4 * values.capacity());
        self.weights[bucket] = Held::Whole(self.tensor(values));
        Ok(())
    }

    /// For rank 0 of all the values of a bucket of each part of the blocks, by part, from the ranks of its copy; the others get
    /// nothing.
    fn for_the_first(&self, bucket: usize) -> Result<Vec<Vec<f32>>, Error> {
        let (all, copy, parts) = (&self.team.all, &self.team.copy, self.team.tensor.world());
        let mut end = 0;
        let mut pieces: Vec<Range<usize>> = Vec::with_capacity(all.world());
        for rank in 0..copy.world() {
            let begin = end;
            end += self.partition.piece(bucket, rank / parts).len();
            pieces.push(begin..end);
        }
        // Copies elsewhere are not needed.
        pieces.resize(all.world(), end..end);
        let own = match &self.weights[bucket] {
            _ if all.rank() >= copy.world() => Vec::new(),
            Held::Piece(piece) => piece.clone(),
            Held::Whole(weights) => cut(weights, self.piece(bucket)),
        };
        let values = all.gather(own, &pieces, 0)?()?;
        if all.rank() > 0 {
            return Ok(Vec::new());
        }
        let of_part = |part| pieces.iter().skip(part).step_by(parts).flat_map(|piece| &values[piece.clone()]);
        Ok((0..parts).map(|part| of_part(part).copied().collect()).collect())
    }

    /// The first or the second moments of this rank's shard.
    fn moments(&self, which: usize) -> Vec<f32> {
        let mut shard = Vec::with_capacity(self.partition.shard_len(self.team.inner.rank()));
        for (bucket, moments) in self.moments.iter().enumerate() {
            match self.sharding {
                Sharding::None => shard.extend_from_slice(&moments[which][self.piece(bucket)]),
                _ => shard.extend_from_slice(&moments[which]),
            }
        }
        shard
    }
}

/// Updates `values`, the range `range` of the flat buffer, with their gradient.
fn step(
    partition: &Partition,
    range: &Range<usize>,
    values: &mut [f32],
    [first, second]: &mut [Vec<f32>; 2],
    gradient: &[f32],
    factors: &Factors,
) {
    for (part, decays) in partition.decays(range) {
        let part = part.start - range.start..part.end - range.start;
        let moments = [&mut first[part.clone()], &mut second[part.clone()]];
        factors.update(&mut values[part.clone()], moments, &gradient[part], decays);
    }
}

/// The values `piece` of a buffer.
fn cut(buffer: &Tensor<1>, piece: Range<usize>) -> Vec<f32> {
    let buffer = buffer.clone().try_into_primitive::<Flex>().unwrap_or_else(|error| unreachable!("{error:?}"));
    cpu::values(&cpu::contiguous(buffer))[piece].to_vec()
}

/// The values of matrices, one after the other.
fn flatten(matrices: Vec<Tensor<2>>, count: usize) -> Vec<f32> {
    let mut flat = Vec::with_capacity(count);
    for matrix in matrices {
        let matrix = matrix.try_into_primitive::<Flex>().unwrap_or_else(|error| unreachable!("{error:?}"));
        flat.extend_from_slice(cpu::values(&cpu::contiguous(matrix)));
    }
    flat
}

/// The first value of a tape, where there is one.
fn leaf<const D: usize>(tensor: Tensor<D>, tracked: bool) -> Tensor<D> {
    if tracked { tensor.autodiff().require_grad() } else { tensor }
}

/// A value of a tape without it.
fn plain<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.is_autodiff() { tensor.inner() } else { tensor }
}

/// Weights in the order they are needed; the next ones are on their way while the present ones are used.
struct Gathers<'a> {
    host: &'a Host,
    order: std::vec::IntoIter<usize>,
    ahead: Option<Fetch>,
    /// Bytes of sums of gradients meanwhile.
    sums: usize,
}

impl Gathers<'_> {
    fn next(&mut self) -> Result<Tensor<1>, Error> {
        let Some(fetch) = self.ahead.take() else { unreachable!("there is one for every use") };
        self.ahead = self.order.next().map(|bucket| self.host.fetch(bucket)).transpose()?;
        match fetch {
            Fetch::Here(weights) => Ok(weights),
            Fetch::Coming(values) => {
                let values = values()?;
                self.host.look(self.sums + 4 * values.capacity());
                Ok(self.host.tensor(values))
            }
        }
    }
}

/// The targets of all ranks that count, and the largest number of micro batches of a rank.
fn agree(team: &Team, parts: &[Rows]) -> Result<(u64, usize), Error> {
    let counted: usize = parts.iter().map(Rows::counted).sum();
    let own = [counted as u64, parts.len() as u64];
    let own: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
    let (mut total, mut most) = (0, 0);
    for (rank, bytes) in team.of_places(team.all.exchange(&own)?).enumerate() {
        let ([counted, parts], []) = bytes.as_chunks::<8>() else {
            let rank = rank * team.tensor.world();
            return Err(Error::Rank { rank, reason: format!("sent {} bytes of counts", bytes.len()) });
        };
        total += u64::from_le_bytes(*counted);
        most = most.max(u64::from_le_bytes(*parts) as usize);
    }
    Ok((total, most))
}

impl Engine for Host {
    fn step(&mut self, batch: &Batch, rate: f64) -> Result<(), Error> {
        let parts = self.own_tokens(self.parts(batch)?);
        let (counted, most) = agree(&self.team, &parts)?;
        self.fullest.set(0);
        let (gradients, losses) = self.accumulate(&parts, counted, most)?;
        let gradients = self.add_copies(gradients)?;
        let norm = self.norm(&gradients)?;
        self.outcome.loss = self.losses(&losses)?.iter().sum();
        self.outcome.grad_norm = norm;
        match Factors::new(&self.config.optimizer, self.taken + 1, norm, rate) {
            Some(factors) => {
                self.update(gradients, &factors)?;
                self.taken += 1;
                self.outcome.skipped_last = 0;
            }
            None => {
                self.outcome.skipped += 1;
                self.outcome.skipped_last += 1;
            }
        }
        Ok(())
    }

    fn outcome(&mut self) -> Result<Outcome, Error> {
        Ok(self.outcome)
    }

    fn is_synchronous(&self) -> bool {
        true
    }

    fn state_bytes(&self) -> Option<u64> {
        Some(self.fullest.get() as u64)
    }

    fn loss(&self, batch: &Batch) -> Result<f64, Error> {
        let parts = self.parts(batch)?;
        let (rank, world) = self.team.place();
        let own = share(parts.len(), rank, world);
        let most = (0..world).map(|rank| share(parts.len(), rank, world).len()).max().unwrap_or(0);
        let mut losses = Vec::with_capacity(own.len());
        for index in 0..most {
            let rows = parts[own.clone()].get(index);
            let mut gathers = self.gathers((0..=self.last()).collect())?;
            let table = gathers.next()?;
            let mut x = rows.map(|rows| self.network.embed(&self.matrix(0, &table, false), &rows.inputs));
            for layer in 0..self.layers() {
                let weights = gathers.next()?;
                x = match rows.zip(x.take()) {
                    Some((rows, x)) => {
                        let pass = Pass { rows, tracked: false, parts: false };
                        let input = Input { x, state: None, joined: None };
                        Some(self.after(&self.tapes(layer, &weights, input, pass, Box::new(drop))?)?)
                    }
                    None => {
                        self.pass_by()?;
                        None
                    }
                };
            }
            let weights = gathers.next()?;
            if let (Some(rows), Some(x)) = (rows, x) {
                let head = self.matrix(self.last(), &weights, false);
                let loss: f32 = self.network.loss(&head, x, &rows.targets, 0.0).into_scalar();
                losses.push(loss);
            }
        }
        let counted = parts.iter().map(Rows::counted);
        let sum: f64 =
            self.losses(&losses)?.into_iter().zip(counted.clone()).map(|(loss, counted)| loss * counted as f64).sum();
        Ok(sum / counted.sum::<usize>().max(1) as f64)
    }

    fn snapshot(&mut self) -> Result<Pending, Error> {
        let mut values = Vec::with_capacity(self.partition.shard_len(self.team.inner.rank()));
        for (bucket, held) in self.weights.iter().enumerate() {
            match held {
                Held::Piece(piece) => values.extend_from_slice(piece),
                Held::Whole(weights) => values.extend(cut(weights, self.piece(bucket))),
            }
        }
        let snapshot = Snapshot {
            values,
            first: self.moments(0),
            second: self.moments(1),
            taken: self.taken,
            skipped: self.outcome.skipped,
        };
        Ok(Box::new(move || Ok(snapshot)))
    }

    fn reader(&mut self) -> Result<Option<Box<dyn Reader + '_>>, Error> {
        let leads = self.team.all.rank() == 0;
        let (model, parts) = (&self.config.model, self.team.tensor.world());
        let lists: Vec<ParameterList> = (0..parts).map(|rank| ParameterList::part(model, rank, parts)).collect();
        let mut values = vec![0f32; if leads { model.parameters() } else { 0 }];
        for (number, bucket) in self.partition.buckets().iter().enumerate() {
            let of_parts = match &self.weights[number] {
                Held::Whole(weights) if parts == 1 && leads => vec![read(weights.clone())],
                Held::Whole(_) if parts == 1 => Vec::new(),
                _ => self.for_the_first(number)?,
            };
            for (list, of_part) in lists.iter().zip(&of_parts) {
                let mut rest = of_part.as_slice();
                for parameter in &list.iter().as_slice()[bucket.parameters.clone()] {
                    for place in parameter.place.ranges(0..parameter.range().len()) {
                        let (run, after) = rest.split_at(place.len());
                        values[place].copy_from_slice(run);
                        rest = after;
                    }
                }
            }
        }
        if !leads {
            return Ok(None);
        }
        let model = Model::from_values(&self.config.model, values, &self.device)?;
        Ok(Some(Box::new(ModelReader::new(&model))))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::tape::Tape;
    use super::*;
    use crate::config::{ModelConfig, OptimizerConfig};
    use crate::model::{initial_shard, initial_values};
    use crate::parallel::testing::together;
    use crate::rng::Rng;

    #[test]
    fn block_by_block_gives_the_bits_of_one_tape() {
        let model = ModelConfig {
            vocab_size: 50,
            decoder_embed_dim: 24,
            decoder_layers: 3,
            decoder_attention_heads: 3,
            hidden_dim: 24,
            glu_dim: 40,
            linear_use_lrpe_list: vec![1, 0, 1],
            init_std: 0.2,
            ..ModelConfig::default()
        };
        // Without clipping: the norm is summed in another order, and may differ in its last bit.
        let optimizer = OptimizerConfig { clip_norm: 0.0, ..OptimizerConfig::default() };
        let config = TrainConfig {
            sequence_length: 21,
            batch: 2,
            gradient_accumulation: 2,
            z_loss: 1e-3,
            model,
            optimizer,
            ..TrainConfig::default()
        };
        let mut rng = Rng::new(1, 0);
        let mut batch = || {
            let tokens = (0..4 * 22).map(|_| (rng.next_u64() % 50) as u32).collect();
            Batch { tokens, starts: vec![vec![0, 7], vec![], vec![3], vec![0]], length: 21 }
        };
        let (device, values) = (Device::flex(), initial_values(&config.model, 3));
        let team = Team::new(&Alone::shared(), &config).unwrap();
        let mut host = Host::new(&config, &device, team, Snapshot::fresh(values.clone())).unwrap();
        let mut tape = Tape::new(&config, &device, Snapshot::fresh(values)).unwrap();
        for _ in 0..3 {
            let batch = batch();
            host.step(&batch, 0.01).unwrap();
            tape.step(&batch, 0.01).unwrap();
            let [own, other] = [host.outcome().unwrap(), tape.outcome().unwrap()];
            assert_eq!(own.loss.to_bits(), other.loss.to_bits());
            assert!((own.grad_norm / other.grad_norm - 1.0).abs() < 1e-12, "{own:?} {other:?}");
            assert!(host.snapshot().unwrap()().unwrap() == tape.snapshot().unwrap()().unwrap());
            assert_eq!(host.loss(&batch).unwrap().to_bits(), tape.loss(&batch).unwrap().to_bits());
        }
        let read = |engine: &mut dyn Engine| engine.reader().unwrap().unwrap().read(&[1, 2, 3]).unwrap();
        assert_eq!(read(&mut host), read(&mut tape));
    }

    /// ‖got − want‖ / ‖want‖.
    fn distance(got: &[f32], want: &[f32]) -> f64 {
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let apart = norm(&mut got.iter().zip(want).map(|(got, want)| f64::from(got - want)));
        apart / norm(&mut want.iter().map(|want| f64::from(*want)))
    }

    #[test]
    fn ranks_that_share_blocks_take_the_steps_of_one() {
        let model = ModelConfig {
            vocab_size: 50,
            decoder_embed_dim: 24,
            decoder_layers: 3,
            decoder_attention_heads: 4,
            hidden_dim: 32,
            glu_dim: 40,
            linear_use_lrpe_list: vec![1, 0, 1],
            init_std: 0.2,
            ..ModelConfig::default()
        };
        let config = TrainConfig {
            sequence_length: 21,
            batch: 2,
            gradient_accumulation: 4,
            z_loss: 1e-3,
            model,
            ..TrainConfig::default()
        };
        let mut rng = Rng::new(1, 0);
        let tokens: Vec<u32> = (0..8 * 22).map(|_| (rng.next_u64() % 50) as u32).collect();
        let starts = [vec![0, 7], vec![], vec![3], vec![0], vec![1, 2, 20], vec![], vec![], vec![11]];
        // The rows of rank `rank` of `world`.
        let rows = |rank: usize, world: usize| {
            let rows = share(8, rank, world);
            let tokens = tokens[rows.start * 22..rows.end * 22].to_vec();
            Batch { tokens, starts: starts[rows].to_vec(), length: 21 }
        };
        let device = Device::flex();
        // The state after a step, before it and after it the loss of other rows, and what is read.
        let run = |group: &Arc<dyn Collective>, config: &TrainConfig| {
            let team = Team::new(group, config).unwrap();
            let places = team.partition(config).places(team.inner.rank());
            let values = initial_shard(&config.model, 3, &places);
            let (rank, world) = team.rows();
            let mut host = Host::new(config, &device, team, Snapshot::fresh(values)).unwrap();
            host.step(&rows(rank, world), 0.01).unwrap();
            let snapshot = host.snapshot().unwrap()().unwrap();
            let loss = host.loss(&rows(1, 3)).unwrap();
            let read = host.reader().unwrap().map(|mut reader| reader.read(&[1, 2, 3]).unwrap());
            group.leave(None);
            (places, host.outcome, snapshot, loss, read)
        };
        let one = run(&Alone::shared(), &config);
        let list = ParameterList::of(&config.model);
        for (world, tensor_ranks, sequence_ranks, sharding, hybrid) in [
            (2, 2, 1, Sharding::None, 0),
            (4, 4, 1, Sharding::Optimizer, 0),
            (4, 2, 1, Sharding::Full, 0),
            (4, 2, 2, Sharding::Gradients, 0),
            (4, 2, 1, Sharding::Full, 2),
            // Micro batches that not all ranks have.
            (6, 2, 1, Sharding::Full, 0),
        ] {
            let config = TrainConfig { tensor_ranks, sequence_ranks, sharding, hybrid, ..config.clone() };
            let what = format!("{world} {tensor_ranks} {sequence_ranks} {sharding:?}");
            let ranks = together(world, |group| run(&group, &config));
            let mut first = vec![f32::NAN; list.total()];
            for (places, outcome, snapshot, loss, _) in &ranks {
                assert_eq!((outcome, loss.to_bits()), (&ranks[0].1, ranks[0].3.to_bits()), "{what}");
                let mut rest = snapshot.first.as_slice();
                for place in places {
                    let (part, after) = rest.split_at(place.len());
                    // What several ranks have is the same on all of them.
                    for (own, other) in part.iter().zip(&mut first[place.clone()]) {
                        assert!(other.is_nan() || own.to_bits() == other.to_bits(), "{what}");
                        *other = *own;
                    }
                    rest = after;
                }
            }
            let (outcome, want) = (ranks[0].1, one.1);
            assert!((outcome.loss / want.loss - 1.0).abs() < 1e-6, "{what}: {} {}", outcome.loss, want.loss);
            assert!((outcome.grad_norm / want.grad_norm - 1.0).abs() < 1e-5, "{what}: {outcome:?} {want:?}");
            // After a step the first moment is the gradient, but for a factor.
            for parameter in list.iter() {
                let apart = distance(&first[parameter.range()], &one.2.first[parameter.range()]);
                assert!(apart < 2e-5, "{what} {}: {apart:e}", parameter.name);
            }
            assert!((ranks[0].3 / one.3 - 1.0).abs() < 1e-5, "{what}: {} {}", ranks[0].3, one.3);
            let [got, want] = [&ranks[0].4, &one.4].map(|read| read.as_deref().unwrap());
            assert!(distance(got, want) < 1e-4, "{what}");
        }
    }
}
