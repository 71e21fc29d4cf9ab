//! The step in bf16 on CUDA: weights, moments (unless the recipe has them in bf16) and sums of gradients in float32,
//! products and activations in bf16, nothing on the host but the order of the launches. With several GPUs each takes its
//! rows of the batch; what they hold and what goes between them is in [`super::shards`].

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;

use super::block::{Kept, Weights};
use super::partners::Partners;
use super::relay::{self, Line, Neighbours};
use super::shards::{Reduction, Room, Sums, Working, first};
use super::weights::{self, ModelWeights, Plan};
use super::{Decoder, Engine, Outcome, Pending, Snapshot, failed};
use crate::batch::Rows;
use crate::config::{Moments, Sharding, TrainConfig};
use crate::cuda::{self, Collective, Ticket, Work, profile};
use crate::generate::Reader;
use crate::ops::adamw::{self, Settings, Steps, Stretch};
use crate::ops::attention::gated_cuda::Documents;
use crate::ops::cross_entropy::Head;
use crate::ops::weight::GradientSum;
use crate::ops::{embedding, parts, srms_norm};
use crate::parallel::nccl::Gpus;
use crate::parallel::{self, Partition, Team};
use crate::parameters::{Parameter, ParameterList};
use crate::{Batch, Error};

/// Model and optimizer on one GPU, or a rank's part of them.
pub struct Mixed {
    config: TrainConfig,
    team: Team,
    /// The other ranks' GPUs; none where there is no other.
    gpus: Option<Arc<Gpus>>,
    /// `none` where there are no GPUs to share with.
    sharding: Sharding,
    plan: Plan,
    room: Room,
    /// Weights and moments: buffers of all or of own.
    values: CubeTensor,
    moments: [CubeTensor; 2],
    steps: Steps,
    /// What this rank updates, with the buckets that it belongs to.
    stretches: Vec<(Range<usize>, Option<Stretch>)>,
    working: Working,
    reduction: Reduction,
    angles: Angles,
    /// Micro batches of a step, the same number on every rank.
    rounds: usize,
    /// Where ranks share rows, the tokens of each that this one has, and the way of states between them.
    tokens: Option<Range<usize>>,
    line: Option<Box<dyn Line>>,
    /// Where ranks share the blocks, those that share them with this one.
    partners: Option<Box<dyn Partners>>,
    /// Losses of the micro batches of the last step, of all ranks; they add up.
    losses: CubeTensor,
    /// Steps skipped before this process.
    skipped_before: u64,
    /// A snapshot is being read: what it is read from may not change before it is done.
    reading: Option<std::sync::mpsc::Receiver<()>>,
}

/// The angles of LRPE in float32, of all layers that have them.
struct Angles {
    places: Vec<Place>,
    /// The weights themselves, or copies where a rank has but its pieces.
    buffer: CubeTensor,
}

/// Where the angles of a layer are.
struct Place {
    bucket: usize,
    /// In the list of parameters.
    range: Range<usize>,
    /// Their first value in the buffer.
    at: usize,
    coming: RefCell<Option<Ticket>>,
}

impl Angles {
    fn of(&self, parameter: &Parameter) -> CubeTensor {
        let place = self.places.iter().find(|place| place.range.start == parameter.offset);
        let Some(place) = place else { unreachable!("{} has no place", parameter.name) };
        if let Some(ticket) = place.coming.take() {
            ticket.wait(&self.buffer);
        }
        cuda::flat_view(&self.buffer, place.at, parameter.matrix())
    }
}

/// A micro batch on the device.
struct Part<'a> {
    rows: &'a Rows,
    documents: Documents,
}

impl Mixed {
    /// Why a model of these settings has no such step. Ranks that share blocks have parts with a form of their own:
    /// [`weights::shared`].
    pub(super) fn check(config: &TrainConfig) -> Result<(), String> {
        if config.sequence_length < 64 {
            return Err(format!("bf16 needs sequences of 64 tokens or more, not {}", config.sequence_length));
        }
        weights::check(&config.model)
    }

    /// The engine at `snapshot`, which is this rank's shard. All ranks of `team` make theirs together.
    ///
    /// # Errors
    /// When a library lacks that the step needs, and what the ranks tell of one that is lost.
    pub(super) fn new(config: &TrainConfig, device: &Device, team: Team, snapshot: Snapshot) -> Result<Self, Error> {
        let libraries = cuda::libraries::find();
        if let Err(advice) = &libraries.products.found {
            return Err(Error::Device { device: format!("{device:?}"), reason: advice.clone() });
        }
        let world = team.all.world();
        let near = cuda::of(Tensor::<1>::zeros([8], device));
        // A world of one takes the same way where it can: what sharding costs by itself shows there.
        let joins = world > 1 || (config.sharding != Sharding::None && libraries.collectives.found.is_ok());
        let gpus = if joins { Some(Arc::new(Gpus::join(&near, &team)?)) } else { None };
        let line = gpus.as_ref().filter(|_| team.sequence.world() > 1);
        let partners = gpus.as_ref().and_then(|gpus| gpus.partners().cloned());
        let links = Links {
            line: line.map(|gpus| Box::new(Neighbours::new(gpus.clone())) as Box<dyn Line>),
            partners: partners.map(|partners| Box::new(partners) as Box<dyn Partners>),
            gpus,
        };
        Self::with(config, device, team, snapshot, links)
    }

    /// [`Mixed::new`] of ranks whose GPUs are joined by `links`.
    fn with(
        config: &TrainConfig,
        device: &Device,
        team: Team,
        snapshot: Snapshot,
        links: Links,
    ) -> Result<Self, Error> {
        let Links { gpus, line, partners } = links;
        let near = cuda::of(Tensor::<1>::zeros([8], device));
        // Of an engine that was here before: what lived as long as it did stays where it was until it is asked for.
        cuda::give_all_back(&near).map_err(failed)?;
        let sharding = if gpus.is_some() { config.sharding } else { Sharding::None };
        let part = [team.tensor.rank(), team.tensor.world()];
        let plan = Plan::part(&config.model, part, &near.device);
        let room = Room::new(team.partition(config), team.inner.rank());
        let Snapshot { values, first: first_moment, second, taken, skipped } = snapshot;
        let taken = u32::try_from(taken).unwrap_or(u32::MAX);
        let place = |values: Vec<f32>| {
            let values = TensorData::new(room.pad(values), [room.own_len()]);
            let upload = |values| cuda::contiguous(cuda::of(Tensor::<1>::from_data(values, device)));
            near.client.memory_persistent_allocation(values, upload)
        };
        // The shards of all ranks, where this one keeps everything.
        let spread = |own: CubeTensor| match &gpus {
            Some(gpus) if sharding == Sharding::None => {
                let all = cuda::lasting(&near, [room.all_len()], own.dtype);
                for bucket in 0..room.buckets() {
                    let to = room.bucket(&all, bucket);
                    gpus.start(Collective::AllGather, &room.own(&own, bucket), &to).wait(&near);
                }
                all
            }
            _ => own,
        };
        let values = spread(place(values));
        let moments = match (taken, config.optimizer.moments) {
            (0, moments) => adamw::zero_moments(&values, moments),
            (_, Moments::Float32) => [first_moment, second].map(|moment| spread(place(moment))),
            // Exact for what was bf16.
            (_, Moments::Bf16) => [first_moment, second].map(|moment| {
                let upload = |values: Vec<f32>| cuda::upload_bf16(&near.device, &values);
                spread(near.client.memory_persistent_allocation(room.pad(moment), upload))
            }),
        };

        let (global_rows, (_, sharing)) = (config.batch * config.gradient_accumulation, team.rows());
        let most_rows = (0..sharing).map(|rank| parallel::share(global_rows, rank, sharing).len()).max();
        let rounds = most_rows.unwrap_or(0).div_ceil(config.batch).max(1);
        let working = Working::new(&room, gpus.clone(), sharding, &near);
        let reduction = Reduction::new(&room, &plan, gpus.clone(), sharding, config.gradient_reduction, rounds, &near);
        let buffers = Buffers { values: &values, moments: &moments, working: &working, reduction: &reduction };
        let stretches = stretches(&room, sharding, &buffers);
        let list = ParameterList::part(&config.model, part[0], part[1]);
        let without_decay: Vec<_> = list.iter().filter(|p| !p.decays()).map(Parameter::range).collect();
        let steps = Steps::new(&near, &without_decay, taken);
        let angles = angles(&plan, &room, sharding, &values);
        let losses = cuda::empty(&near, [rounds], DType::F32);
        let (rank, parts) = (team.sequence.rank(), team.sequence.world());
        let tokens = (parts > 1).then(|| relay::tokens(config.sequence_length, rank, parts));
        let mixed = Self {
            config: config.clone(),
            team,
            gpus,
            sharding,
            plan,
            room,
            values,
            moments,
            steps,
            stretches,
            working,
            reduction,
            angles,
            rounds,
            tokens,
            line,
            partners,
            losses,
            skipped_before: skipped,
            reading: None,
        };
        match mixed.working.all() {
            Some(all) if mixed.sharding == Sharding::None => adamw::narrow(&mixed.values, all),
            _ => {
                for bucket in 0..mixed.room.buckets() {
                    adamw::narrow(&mixed.room.own(&mixed.values, bucket), &mixed.working.own(bucket));
                    mixed.spread_angles(bucket);
                    mixed.working.written(bucket);
                }
            }
        }
        mixed.settle()?;
        // Of what was here on its way only.
        cuda::give_all_back(&mixed.values).map_err(failed)?;
        Ok(mixed)
    }

    /// Something on its device.
    pub fn near(&self) -> &CubeTensor {
        &self.values
    }

    /// A decoder of `rows` rows with the weights as they are; later steps may change them. All ranks make theirs together.
    pub fn decoder(&self, rows: usize) -> Decoder {
        let weights = self.weights(true).unwrap_or_else(|| unreachable!("they are kept"));
        Decoder::of(&self.config.model, weights, rows, self.values.device.clone())
    }

    /// The weights of the whole model as they are, where this rank is to `keep` them. All ranks call it together.
    fn weights(&self, keep: bool) -> Option<ModelWeights> {
        let Some(partners) = &self.partners else {
            let all = self.working.gathered(keep)?;
            let bucket = |bucket| self.room.bucket(&all, bucket);
            return Some(ModelWeights::new(&self.plan, bucket, |parameter| self.angles.of(parameter)));
        };
        let (model, near, world) = (&self.config.model, &self.values, partners.world());
        let whole = Partition::new(model, 1);
        let lists: Vec<ParameterList> = (0..world).map(|rank| ParameterList::part(model, rank, world)).collect();
        let all = keep.then(|| cuda::empty(near, [whole.parameters().total()], DType::BF16));
        let last = self.room.buckets() - 1;
        for (bucket, of_whole) in whole.buckets().iter().enumerate() {
            let values = self.working.bucket(bucket, Some(bucket + 1).filter(|next| *next <= last));
            let range = self.room.range(bucket);
            let own = first(&values, range.len());
            let parts = if self.room.is_split(bucket) {
                let of_all = cuda::empty(near, [world * range.len()], DType::BF16);
                partners.gather(&own, &of_all);
                (0..world).map(|rank| cuda::flat_view(&of_all, rank * range.len(), [range.len()])).collect()
            } else {
                vec![own]
            };
            let Some(all) = &all else { continue };
            for (list, part) in lists.iter().zip(&parts) {
                for parameter in &list.iter().as_slice()[of_whole.parameters.clone()] {
                    let at = parameter.offset - range.start;
                    let values = cuda::flat_view(part, at, [parameter.range().len()]);
                    parts::put(&values, parameter.place, all);
                }
            }
        }
        // Each has those of its heads, which follow each other.
        let angles: Vec<CubeTensor> = self
            .plan
            .angles()
            .map(|parameter| {
                let ([heads, keys], own) = (parameter.matrix(), self.angles.of(parameter));
                let of_all = cuda::empty(near, [world * heads, keys], DType::F32);
                partners.gather(&own, &of_all);
                of_all
            })
            .collect();
        let all = all?;
        let plan = Plan::new(model, &near.device);
        let places: Vec<usize> = plan.angles().map(|parameter| parameter.offset).collect();
        let bucket = |bucket: usize| {
            let range = plan.buckets()[bucket].range.clone();
            cuda::flat_view(&all, range.start, [range.len()])
        };
        let angles = |parameter: &Parameter| {
            let found = places.iter().zip(&angles).find(|(place, _)| **place == parameter.offset);
            found.map_or_else(|| unreachable!("{} was gathered", parameter.name), |(_, angles)| angles.clone())
        };
        Some(ModelWeights::new(&plan, bucket, angles))
    }

    fn parts(&self, batch: &Batch) -> Result<Vec<Rows>, Error> {
        crate::model::check_ids(&batch.tokens, self.config.model.vocab_size)?;
        // A rank may have no row of a small batch.
        if batch.rows() == 0 { Ok(Vec::new()) } else { batch.split(self.config.batch) }
    }

    /// Of whole rows what this rank computes in a step.
    fn own_tokens(&self, parts: Vec<Rows>) -> Vec<Rows> {
        match &self.tokens {
            Some(tokens) => parts.iter().map(|rows| rows.part(tokens.clone())).collect(),
            None => parts,
        }
    }

    fn part<'a>(&self, rows: &'a Rows) -> Part<'a> {
        Part { rows, documents: Documents::new(&rows.sequences, &self.values.device) }
    }

    /// Waits for the device, as long as all ranks are alive.
    fn settle(&self) -> Result<(), Error> {
        match &self.gpus {
            Some(gpus) => gpus.settle(&self.values),
            // Whoever reads from the device waits.
            None => Ok(()),
        }
    }

    /// A block's weights; `then` is the bucket that is used after it.
    fn block(&self, layer: usize, then: Option<usize>) -> Weights {
        let values = self.working.bucket(layer + 1, then);
        self.plan.block(layer, &values, |parameter| self.angles.of(parameter))
    }

    /// The stream after the last block, and what every block keeps; nothing without `keep`. States come and go through `line`
    /// where the part has but some tokens of its rows. Without a part this rank gives the others their weights alone.
    fn forward(&self, part: Option<&Part<'_>>, keep: bool, line: Option<&dyn Line>) -> (Option<CubeTensor>, Vec<Kept>) {
        let table = self.plan.table(0, &self.working.bucket(0, Some(1)));
        let mut x = part.map(|part| embedding::forward(&table, &part.rows.inputs, self.plan.scale));
        let mut kept = Vec::with_capacity(self.plan.layers());
        for layer in 0..self.plan.layers() {
            let block = self.block(layer, Some(layer + 2));
            let Some((part, before)) = part.zip(x.take()) else { continue };
            let again = !keep || self.config.activation_checkpointing.again(layer);
            let relay = block.relay(line, &part.documents, false);
            let (y, of_block) = block.forward(before, &part.documents, again, relay, self.partners.as_deref());
            x = Some(y);
            if keep {
                kept.push(of_block);
            }
        }
        (x, kept)
    }

    /// Forward and backward of micro batch `round`, or what this rank does for the others where it has none; `share` is the
    /// factor of every row's loss. With `last` the gradients go to where they belong.
    fn round(&self, round: usize, rows: Option<&Rows>, share: f32, last: bool) {
        profile::phase("forward");
        let part = rows.map(|rows| self.part(rows));
        let forward = self.forward(part.as_ref(), true, self.line.as_deref());
        self.backward(round, part.as_ref(), forward, share, last);
    }

    /// The rest of [`Mixed::round`], of what its forward gave.
    fn backward(
        &self,
        round: usize,
        part: Option<&Part<'_>>,
        (x, mut kept): (Option<CubeTensor>, Vec<Kept>),
        share: f32,
        last: bool,
    ) {
        profile::phase("head");
        let head = self.plan.head();
        let weight = self.plan.table(head, &self.working.bucket(head, Some(head - 1)));
        let sums = self.reduction.sums(&self.plan, head);
        let mut dx = None;
        if let (Some(part), Some(x), Sums::Table(sum)) = (part, x, &sums) {
            dx = Some(self.head(round, part, x, &weight, sum, share));
        }
        if last {
            self.reduction.reduce(head, self.partners.as_deref());
        }
        profile::phase("backward");
        for layer in (0..self.plan.layers()).rev() {
            // The block before; before the first of them the embedding, which the next micro batch begins with.
            let then = Some(layer).filter(|&bucket| bucket > 0 || !last);
            let block = self.block(layer, then);
            let sums = self.reduction.sums(&self.plan, layer + 1);
            if let (Some(part), Some(dy), Some(kept), Sums::Block(sums)) = (part, dx.take(), kept.pop(), &sums) {
                let relay = || block.relay(self.line.as_deref(), &part.documents, true);
                dx = Some(block.backward(sums, kept, dy, &part.documents, relay, self.partners.as_deref()));
            }
            if last {
                self.reduction.reduce(layer + 1, None);
            }
        }
        let sums = self.reduction.sums(&self.plan, 0);
        // Ranks that share blocks all have the same gradient of the stream. The first makes that of the embedding and the others
        // have zeros: whatever the order in which the ranks beside each of them are added up, all get the bits of one.
        let makes = self.team.tensor.rank() == 0;
        if let (Some(part), Some(dx), Sums::Table(sum), true) = (part, dx, &sums, makes) {
            let vocabulary = self.config.model.vocab_size;
            let backward = embedding::Backward::new(&part.rows.inputs, vocabulary, self.plan.scale);
            let (dw, accumulate) = sum.next();
            backward.add(&dx, dw, accumulate);
        }
        if last {
            self.reduction.reduce(0, self.partners.as_deref());
        }
    }

    /// The gradient of the stream `x` after the last block; adds that of the head's `weight` to its `sum`, and keeps the loss.
    /// Of ranks that share blocks, which have the same stream, each takes a part of the tokens.
    fn head(
        &self,
        round: usize,
        part: &Part<'_>,
        x: CubeTensor,
        weight: &CubeTensor,
        sum: &GradientSum,
        share: f32,
    ) -> CubeTensor {
        let ([tokens, width], _) = cuda::rows(&x);
        let of = |x: CubeTensor, own: Range<usize>| {
            let hidden = srms_norm::forward_on_cuda(&x);
            let targets = &part.rows.targets[own];
            let head = Head { targets, z_loss: self.config.z_loss as f32, factor: share };
            let (dw, accumulate) = sum.next();
            let (loss, d_hidden) = head.gradients(&hidden, weight, dw, accumulate);
            drop(hidden);
            let mut work = Work::near(&loss);
            work.copy(&loss, &cuda::flat_view(&self.losses, round, [1]));
            work.submit();
            profile::phase("backward");
            srms_norm::backward_on_cuda(&x, &d_hidden, None, None)
        };
        let Some(partners) = &self.partners else { return of(x, 0..tokens) };
        let (rank, world) = (self.team.tensor.rank(), partners.world());
        let piece = tokens.div_ceil(world);
        let own = (rank * piece).min(tokens)..((rank + 1) * piece).min(tokens);
        // There may be none left for the last ranks.
        let of_own = (!own.is_empty()).then(|| of(cuda::row_range(&x, own.start, own.len()), own.clone()));
        let padded = match of_own {
            Some(dx) if own.len() == piece => dx,
            fewer => {
                let padded = cuda::empty(&x, [piece, width], DType::BF16);
                if let Some(dx) = fewer {
                    let mut work = Work::near(&dx);
                    work.copy(&dx, &cuda::row_range(&padded, 0, own.len()));
                    work.submit();
                }
                padded
            }
        };
        let all = cuda::empty(&x, [world * piece, width], DType::BF16);
        partners.gather(&padded, &all);
        cuda::row_range(&all, 0, tokens)
    }

    /// Forward and backward of the ranks' batches; their gradients and losses are on their way.
    fn accumulate(&self, batch: &Batch) -> Result<(), Error> {
        let parts = self.own_tokens(self.parts(batch)?);
        let counted: f64 = parts.iter().map(|rows| rows.counted() as f64).sum();
        let counted = self.sum(counted)?;
        let share = (1.0 / counted.max(1.0)) as f32;
        self.reduction.restart();
        let mut work = Work::near(&self.losses);
        work.zero(&self.losses);
        work.submit();
        for round in 0..self.rounds {
            self.round(round, parts.get(round), share, round + 1 == self.rounds);
        }
        if let Some(line) = &self.line {
            line.finish(&self.losses);
        }
        let losses = self.gpus.as_ref().map(|gpus| gpus.add_up(Collective::AllReduce, &self.losses, &self.losses));
        let of_partners = self.partners.as_ref().map(|partners| partners.add_up(&self.losses));
        self.reduction.finish();
        if let Some(losses) = losses {
            losses.wait(&self.losses);
        }
        if let Some(of_partners) = of_partners {
            of_partners();
        }
        Ok(())
    }

    /// The sum of a number of every rank, in their order; of ranks that share blocks, which see the same tokens, that of one.
    fn sum(&self, own: f64) -> Result<f64, Error> {
        if self.team.all.world() == 1 {
            return Ok(own);
        }
        let said = self.team.all.exchange(&own.to_le_bytes())?;
        let number = |bytes: Vec<u8>| <[u8; 8]>::try_from(&bytes[..]).map_or(f64::NAN, f64::from_le_bytes);
        Ok(self.team.of_places(said).map(number).sum())
    }

    /// Where several communicators have added up the same squares, maybe in other orders, gives all ranks the sums of the first,
    /// so that all of them take the same step to the bit.
    fn level_norm(&self) {
        let copies = self.gpus.as_ref().filter(|gpus| gpus.has_copies());
        if self.partners.is_none() && copies.is_none() {
            return;
        }
        let partials = self.steps.partials();
        if self.team.all.rank() > 0 {
            let mut work = Work::near(partials);
            work.zero(partials);
            work.submit();
        }
        // Zeros and one number: any order gives that number.
        if let Some(gpus) = &self.gpus {
            gpus.add_up(Collective::AllReduce, partials, partials).wait(partials);
        }
        if let Some(partners) = &self.partners {
            partners.add_up(partials)();
        }
    }

    /// Where a rank has but its pieces, gives the angles of a bucket to all.
    fn spread_angles(&self, bucket: usize) {
        let Some(gpus) = self.gpus.as_ref().filter(|_| self.sharding != Sharding::None) else { return };
        let (begin, piece) = (self.room.range(bucket).start, self.room.piece(bucket));
        for place in self.angles.places.iter().filter(|place| place.bucket == bucket) {
            let angles = place.range.start - begin..place.range.end - begin;
            let to = cuda::flat_view(&self.angles.buffer, place.at, [angles.len()]);
            let mut work = Work::near(&to);
            work.zero(&to);
            let held = angles.start.max(piece.start)..angles.end.min(piece.end);
            if !held.is_empty() {
                let own = self.room.own(&self.values, bucket);
                let from = cuda::flat_view(&own, held.start - piece.start, [held.len()]);
                work.copy(&from, &cuda::flat_view(&to, held.start - angles.start, [held.len()]));
            }
            work.submit();
            // Zeros and the one value there is: their sum is that value.
            place.coming.replace(Some(gpus.start(Collective::AllReduce, &to, &to)));
        }
    }
}

/// The ways between the ranks' GPUs, where there are others.
struct Links {
    gpus: Option<Arc<Gpus>>,
    line: Option<Box<dyn Line>>,
    partners: Option<Box<dyn Partners>>,
}

/// The buffers that a step goes over.
struct Buffers<'a> {
    values: &'a CubeTensor,
    moments: &'a [CubeTensor; 2],
    working: &'a Working,
    reduction: &'a Reduction,
}

/// What this rank updates: everything, in as few launches as there are gaps and changes from what ranks that share blocks
/// all have to what each has a part of, or its piece of every bucket.
fn stretches(room: &Room, sharding: Sharding, buffers: &Buffers<'_>) -> Vec<(Range<usize>, Option<Stretch>)> {
    let &Buffers { values, moments: [first_moment, second], working, reduction } = buffers;
    let whole = (working.all(), reduction.all());
    let (Some(working), Some(gradient), Sharding::None) = (whole.0, whole.1, sharding) else {
        let of = |bucket| {
            let piece = room.piece(bucket);
            let cut = |values: CubeTensor| first(&values, piece.len());
            let stretch = (!piece.is_empty()).then(|| Stretch {
                values: cut(room.own(values, bucket)),
                first: cut(room.own(first_moment, bucket)),
                second: cut(room.own(second, bucket)),
                gradient: cut(reduction.own(bucket)),
                working: cut(working.own(bucket)),
                origin: room.range(bucket).start + piece.start,
            });
            (bucket..bucket + 1, stretch)
        };
        return (0..room.buckets()).map(of).collect();
    };
    // Place in the buffers and values of each run of buckets without padding between them.
    let mut runs: Vec<(Range<usize>, usize, Range<usize>)> = Vec::new();
    let mut at = 0;
    for bucket in 0..room.buckets() {
        let range = room.range(bucket);
        match runs.last_mut() {
            Some((buckets, begin, values))
                if *begin + values.len() == at && room.is_split(buckets.start) == room.is_split(bucket) =>
            {
                (buckets.end, values.end) = (bucket + 1, range.end);
            }
            _ => runs.push((bucket..bucket + 1, at, range)),
        }
        at += room.bucket(values, bucket).meta.shape().num_elements();
    }
    let of = |(buckets, begin, range): (Range<usize>, usize, Range<usize>)| {
        let cut = |all: &CubeTensor| cuda::flat_view(all, begin, [range.len()]);
        let stretch = Stretch {
            values: cut(values),
            first: cut(first_moment),
            second: cut(second),
            gradient: cut(gradient),
            working: cut(working),
            origin: range.start,
        };
        (buckets, Some(stretch))
    };
    runs.into_iter().map(of).collect()
}

/// Where the angles are read from.
fn angles(plan: &Plan, room: &Room, sharding: Sharding, values: &CubeTensor) -> Angles {
    let (mut places, mut begin, mut end) = (Vec::new(), 0, 0);
    for bucket in 0..room.buckets() {
        let of_bucket = room.range(bucket);
        for range in plan.angles().map(Parameter::range).filter(|range| of_bucket.contains(&range.start)) {
            let at = if sharding == Sharding::None { begin + range.start - of_bucket.start } else { end };
            end += range.len();
            places.push(Place { bucket, range, at, coming: RefCell::default() });
        }
        if sharding == Sharding::None {
            begin += room.bucket(values, bucket).meta.shape().num_elements();
        }
    }
    let buffer = match sharding {
        Sharding::None => values.clone(),
        // A buffer of no bytes has no address.
        _ => cuda::empty(values, [end.max(8)], DType::F32),
    };
    Angles { places, buffer }
}

impl Engine for Mixed {
    fn step(&mut self, batch: &Batch, rate: f64) -> Result<(), Error> {
        self.accumulate(batch)?;
        if let Some(reading) = self.reading.take() {
            // Ends with the sender, whether it sent or not.
            let _ = reading.recv();
        }
        profile::phase("optimizer");
        let config = &self.config.optimizer;
        let settings = Settings {
            rate,
            beta1: config.beta1,
            beta2: config.beta2,
            epsilon: config.epsilon,
            weight_decay: config.weight_decay,
            clip_norm: config.clip_norm,
        };
        // What ranks that share blocks all have counts once.
        let counts = |buckets: &Range<usize>| self.team.tensor.rank() == 0 || self.room.is_split(buckets.start);
        let counted = self.stretches.iter().filter(|(buckets, _)| counts(buckets));
        let gradients = counted.filter_map(|(_, stretch)| stretch.as_ref());
        self.steps.sum_squares(gradients.map(|stretch| &stretch.gradient));
        let sharded = self.sharding != Sharding::None;
        if let Some(gpus) = self.gpus.as_ref().filter(|_| sharded) {
            let partials = self.steps.partials();
            gpus.start(Collective::AllReduce, partials, partials).wait(partials);
        }
        if let Some(partners) = &self.partners {
            partners.add_up(self.steps.partials())();
        }
        self.level_norm();
        self.steps.decide(&settings);
        for (buckets, stretch) in &self.stretches {
            if let Some(stretch) = stretch {
                self.steps.update(stretch, &settings);
            }
            if sharded {
                for bucket in buckets.clone() {
                    self.spread_angles(bucket);
                    self.working.written(bucket);
                }
            }
        }
        // The next step begins with words between the hosts.
        cuda::flush(&self.values);
        Ok(())
    }

    fn outcome(&mut self) -> Result<Outcome, Error> {
        self.settle()?;
        let losses = cuda::download(&self.losses).map_err(failed)?;
        let taken = self.steps.taken().map_err(failed)?;
        // Where logits are larger than all that was there before them, the first forward's activations lie in pages that have
        // no more use.
        cuda::give_back(&self.values).map_err(failed)?;
        Ok(Outcome {
            loss: losses.into_iter().map(|bits| f64::from(f32::from_bits(bits))).sum(),
            grad_norm: f64::from(taken.norm),
            skipped: self.skipped_before + u64::from(taken.skipped),
            skipped_last: u64::from(taken.skipped_last),
        })
    }

    fn is_synchronous(&self) -> bool {
        false
    }

    fn loss(&self, batch: &Batch) -> Result<f64, Error> {
        profile::phase("evaluation");
        let parts = self.parts(batch)?;
        let counted: usize = parts.iter().map(Rows::counted).sum();
        let (rank, world) = self.team.place();
        let mut losses = Vec::with_capacity(parts.len().div_ceil(world));
        for round in 0..parts.len().div_ceil(world) {
            let part = parts.get(round * world + rank).map(|rows| self.part(rows));
            // Of whole rows: what is read once takes little room, and ranks have rows of their own.
            let (x, _) = self.forward(part.as_ref(), false, None);
            let weight = self.plan.table(self.plan.head(), &self.working.bucket(self.plan.head(), None));
            if let (Some(part), Some(x)) = (part, x) {
                let hidden = srms_norm::forward_on_cuda(&x);
                let head = Head { targets: &part.rows.targets, z_loss: 0.0, factor: 1.0 / counted.max(1) as f32 };
                losses.push(head.loss(&hidden, &weight));
            }
        }
        self.settle()?;
        let mut sum = 0.0;
        for loss in &losses {
            let words = cuda::download(loss).map_err(failed)?;
            sum += f64::from(f32::from_bits(words[0]));
        }
        self.sum(sum)
    }

    fn reader(&mut self) -> Result<Option<Box<dyn Reader + '_>>, Error> {
        profile::phase("sample");
        let weights = self.weights(self.team.all.rank() == 0);
        let decoder = weights.map(|weights| Decoder::of(&self.config.model, weights, 1, self.values.device.clone()));
        self.settle()?;
        Ok(decoder.map(|decoder| -> Box<dyn Reader> { Box::new(decoder) }))
    }

    fn record(&mut self) {
        profile::start();
    }

    fn recorded(&mut self) -> Result<Vec<profile::Span>, Error> {
        profile::stop(self.near()).map_err(failed)
    }

    fn memory_bytes(&self) -> Option<u64> {
        cuda::memory(self.near()).ok().map(|memory| memory.total - memory.free)
    }

    fn state_bytes(&self) -> Option<u64> {
        let moments = self.moments.iter().map(cuda::bytes).sum::<u64>();
        Some(cuda::bytes(&self.values) + moments + self.working.bytes() + self.reduction.bytes())
    }

    fn peak_flops(&self) -> Option<f64> {
        cuda::facts_of(self.near()).peak_bf16_flops()
    }

    fn snapshot(&mut self) -> Result<Pending, Error> {
        self.settle()?;
        let taken = self.steps.taken().map_err(failed)?;
        let own = |buffer: &CubeTensor| -> Vec<CubeTensor> {
            let of = |bucket| {
                let piece = self.room.piece(bucket);
                match self.sharding {
                    Sharding::None => cuda::flat_view(&self.room.bucket(buffer, bucket), piece.start, [piece.len()]),
                    _ => first(&self.room.own(buffer, bucket), piece.len()),
                }
            };
            let buckets = 0..self.room.buckets();
            buckets.filter(|&bucket| !self.room.piece(bucket).is_empty()).map(of).collect()
        };
        let [first_moment, second] = &self.moments;
        let buffers = [own(&self.values), own(first_moment), own(second)];
        let skipped = self.skipped_before + u64::from(taken.skipped);
        let (done, reading) = std::sync::mpsc::channel();
        self.reading = Some(reading);
        Ok(Box::new(move || {
            let [values, first, second] = buffers.each_ref().map(|pieces| read_back(pieces));
            drop(done);
            let (values, first, second) = (values?, first?, second?);
            Ok(Snapshot { values, first, second, taken: u64::from(taken.steps), skipped })
        }))
    }
}

/// Values that are read back at once: what the way through pinned memory takes.
const PIECE: usize = 1 << 26;

/// The values of contiguous buffers, one after the other.
fn read_back(buffers: &[CubeTensor]) -> Result<Vec<f32>, Error> {
    let mut values = Vec::with_capacity(buffers.iter().map(|buffer| buffer.meta.shape()[0]).sum());
    for buffer in buffers {
        let count = buffer.meta.shape()[0];
        for begin in (0..count).step_by(PIECE) {
            let piece = cuda::flat_view(buffer, begin, [PIECE.min(count - begin)]);
            values.extend(cuda::download_floats(&piece).map_err(failed)?);
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::rc::Rc;

    use burn::tensor::Shape;

    use super::super::partners::Coming;
    use super::super::relay::Relay;
    use super::*;
    use crate::config::{GradientReduction, ModelConfig, OptimizerConfig, Precision, Recompute};
    use crate::model::{initial_shard, initial_values};
    use crate::ops::testing::cuda_device;
    use crate::parallel::Alone;
    use crate::parallel::testing::together;
    use crate::rng::Rng;

    /// The way of states where one process computes the parts of rows one after the other.
    struct ByHand {
        rank: usize,
        world: usize,
        states: Rc<RefCell<VecDeque<CubeTensor>>>,
    }

    impl Line for ByHand {
        fn relay(&self, _room: &dyn Fn() -> CubeTensor, backwards: bool) -> Relay<'_> {
            let (before, after) = (self.rank > 0, self.rank + 1 < self.world);
            let (comes, goes) = if backwards { (after, before) } else { (before, after) };
            let receive = || self.states.borrow_mut().pop_front().unwrap();
            let send = |state| self.states.borrow_mut().push_back(state);
            Relay {
                receive: comes.then(|| Box::new(receive) as Box<dyn FnOnce() -> CubeTensor>),
                send: goes.then(|| Box::new(send) as Box<dyn FnOnce(CubeTensor)>),
            }
        }

        fn finish(&self, _near: &CubeTensor) {
            assert!(self.states.borrow().is_empty(), "every state was asked for");
        }
    }

    /// The gradient of all parameters in the order of their list, and the loss.
    fn made(engine: &Mixed) -> (Vec<f32>, f32) {
        let all = engine.reduction.all().unwrap();
        let of = |bucket| {
            let gradient = first(&engine.room.bucket(all, bucket), engine.room.range(bucket).len());
            cuda::download_floats(&gradient).unwrap()
        };
        let loss = cuda::download_floats(&engine.losses).unwrap()[0];
        ((0..engine.room.buckets()).flat_map(of).collect(), loss)
    }

    fn relative(got: &[f32], want: &[f32]) -> f64 {
        let square = |x: f64| x * x;
        let difference: f64 = got.iter().zip(want).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
        (difference / want.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn ranks_that_share_rows_have_the_gradients_of_whole_rows() {
        let Some(device) = cuda_device("rows in parts") else { return };
        let model = ModelConfig {
            vocab_size: 512,
            decoder_embed_dim: 128,
            decoder_layers: 3,
            decoder_attention_heads: 2,
            hidden_dim: 128,
            glu_dim: 384,
            linear_use_lrpe_list: vec![1, 0, 0],
            ..ModelConfig::default()
        };
        let config = TrainConfig {
            // Parts of 64, 128 and 168 tokens.
            sequence_length: 360,
            batch: 3,
            gradient_accumulation: 1,
            precision: Precision::Bf16,
            model,
            ..TrainConfig::default()
        };
        let mut rng = Rng::new(21, 0);
        let tokens = (0..config.batch * 361).map(|_| (rng.next_u64() % 512) as u32).collect();
        // Documents that begin at a cut, before and behind one, and one that goes through all parts.
        let batch = Batch { tokens, starts: vec![vec![0, 64, 250], vec![0, 63, 193], vec![0]], length: 360 };
        let values = initial_values(&config.model, 3);
        let start = |config: &TrainConfig| {
            let team = Team::new(&Alone::shared(), config).unwrap();
            Mixed::new(config, &device, team, Snapshot::fresh(values.clone())).unwrap()
        };
        let world = 3;
        let in_parts = |config: &TrainConfig, handed_on: bool| {
            let states = Rc::<RefCell<VecDeque<CubeTensor>>>::default();
            let engines: Vec<Mixed> = (0..world)
                .map(|rank| {
                    let line = ByHand { rank, world, states: states.clone() };
                    let mut engine = start(config);
                    engine.tokens = Some(relay::tokens(config.sequence_length, rank, world));
                    engine.line = handed_on.then(|| Box::new(line) as Box<dyn Line>);
                    engine
                })
                .collect();
            let rows: Vec<Vec<Rows>> =
                engines.iter().map(|engine| engine.own_tokens(engine.parts(&batch).unwrap())).collect();
            let counted: usize = rows.iter().flatten().map(Rows::counted).sum();
            let parts: Vec<Part<'_>> = engines.iter().zip(&rows).map(|(engine, rows)| engine.part(&rows[0])).collect();
            let ahead = |(engine, part): (&Mixed, &Part<'_>)| engine.forward(Some(part), true, engine.line.as_deref());
            let mut forwards: Vec<_> = engines.iter().zip(&parts).map(ahead).collect();
            let (mut gradient, mut loss) = (vec![0f32; values.len()], 0.0);
            for (engine, part) in engines.iter().zip(&parts).rev() {
                engine.reduction.restart();
                engine.backward(0, Some(part), forwards.pop().unwrap(), 1.0 / counted as f32, true);
                let (own, of_part) = made(engine);
                gradient.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
                loss += of_part;
            }
            assert!(states.borrow().is_empty(), "every state was asked for");
            (gradient, loss)
        };

        let whole = start(&config);
        let rows = whole.parts(&batch).unwrap();
        whole.reduction.restart();
        whole.round(0, Some(&rows[0]), 1.0 / rows[0].counted() as f32, true);
        let (want, loss) = made(&whole);
        let (got, of_parts) = in_parts(&config, true);
        assert!((of_parts - loss).abs() < 1e-3 * loss, "{of_parts} in parts, {loss} whole");
        let (apart, _) = in_parts(&config, false);
        let mut worst_apart = 0f64;
        for parameter in ParameterList::of(&config.model).iter() {
            let of = |gradient: &[f32]| relative(&gradient[parameter.range()], &want[parameter.range()]);
            let (error, without) = (of(&got), of(&apart));
            eprintln!("{}: gradient in parts off by {error:.2e}, without states by {without:.2e}", parameter.name);
            // As far as bf16 is from float32, which tests/mixed.rs measured.
            let most = if parameter.name.ends_with("theta") || parameter.name.contains("qkvu") { 5e-2 } else { 2.5e-2 };
            assert!(error < most, "{}: {error}", parameter.name);
            worst_apart = worst_apart.max(without);
        }
        assert!(worst_apart > 0.1, "states matter here: {worst_apart}");
        let again = TrainConfig { activation_checkpointing: Recompute::Full, ..config };
        assert!(in_parts(&again, true) == (got, of_parts), "blocks made again have the same bits");
    }

    /// The ways between ranks that are threads and have one GPU: everything goes over the host.
    struct ByHost {
        group: Arc<dyn parallel::Collective>,
        /// What else the rank sends with, which goes first as on NCCL's stream.
        gpus: Option<Arc<Gpus>>,
    }

    impl ByHost {
        fn over(group: &Arc<dyn parallel::Collective>) -> Self {
            Self { group: group.clone(), gpus: None }
        }

        /// What every rank has in its buffer.
        fn of_all(&self, values: &CubeTensor) -> Vec<Vec<u8>> {
            if let Some(gpus) = &self.gpus {
                // Behind all collectives that were asked for.
                let last = cuda::empty(values, [8], DType::F32);
                let mut work = Work::near(values);
                work.zero(&last);
                work.submit();
                gpus.start(Collective::AllReduce, &last, &last).wait(values);
            }
            // What is added up is of one kind: else sums of other things would pass.
            let own = bytes(values);
            let said = format!("{:?} {:?} {}", values.dtype, values.meta.shape(), own.len());
            let all = self.group.exchange(said.as_bytes()).unwrap();
            assert!(all.iter().all(|other| other == said.as_bytes()), "this rank has {said}, others other buffers");
            self.group.exchange(&own).unwrap()
        }
    }

    /// Writes `bytes` to a contiguous buffer.
    fn write(to: &CubeTensor, bytes: &[u8]) {
        let client = to.client.clone();
        let memory = client.create_from_slice(bytes);
        let shape = Shape::new([to.meta.shape().num_elements()]);
        let from = CubeTensor::new_contiguous(client, to.device.clone(), shape, memory, to.dtype);
        let mut work = Work::near(to);
        work.copy(&from, to);
        work.submit();
    }

    fn bytes(of: &CubeTensor) -> Vec<u8> {
        of.client.read_one(of.handle.clone()).unwrap().to_vec()
    }

    impl Partners for ByHost {
        fn world(&self) -> usize {
            self.group.world()
        }

        fn add_up(&self, values: &CubeTensor) -> Coming {
            let mut of_all = self.of_all(values).into_iter();
            let mut sum = of_all.next().unwrap();
            for other in of_all {
                assert_eq!(sum.len(), other.len());
                let each = sum.chunks_exact_mut(values.dtype.size()).zip(other.chunks_exact(values.dtype.size()));
                each.for_each(|(sum, other)| match (values.dtype, &*sum) {
                    (DType::BF16, &[a, b]) => {
                        let [a, b] =
                            [[a, b], [other[0], other[1]]].map(|bytes| half::bf16::from_ne_bytes(bytes).to_f32());
                        sum.copy_from_slice(&half::bf16::from_f32(a + b).to_ne_bytes());
                    }
                    (DType::F32, &[a, b, c, d]) => {
                        let own = f32::from_ne_bytes([a, b, c, d]);
                        let sum_of_both = own + f32::from_ne_bytes(other.try_into().unwrap());
                        sum.copy_from_slice(&sum_of_both.to_ne_bytes());
                    }
                    (DType::F64, &[a, b, c, d, e, f, g, h]) => {
                        let own = f64::from_ne_bytes([a, b, c, d, e, f, g, h]);
                        let sum_of_both = own + f64::from_ne_bytes(other.try_into().unwrap());
                        sum.copy_from_slice(&sum_of_both.to_ne_bytes());
                    }
                    (dtype, _) => panic!("sums of {dtype:?}"),
                });
            }
            // Whoever reads before the sum is there reads no number.
            write(values, &vec![0xff; sum.len()]);
            let values = values.clone();
            Box::new(move || write(&values, &sum))
        }

        fn gather(&self, own: &CubeTensor, all: &CubeTensor) {
            write(all, &self.of_all(own).concat());
        }
    }

    impl Line for ByHost {
        fn relay(&self, room: &dyn Fn() -> CubeTensor, backwards: bool) -> Relay<'_> {
            let (before, after) = (self.group.rank() > 0, self.group.rank() + 1 < self.group.world());
            let (comes, goes) = if backwards { (after, before) } else { (before, after) };
            let state = room();
            let parallel::Relay { receive, send } =
                self.group.relay(state.meta.shape().num_elements(), backwards).unwrap();
            let receive = move || {
                let values = receive().unwrap();
                write(&state, &values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>());
                state
            };
            let send = move |state: CubeTensor| send(cuda::download_floats(&state).unwrap());
            Relay {
                receive: comes.then(|| Box::new(receive) as Box<dyn FnOnce() -> CubeTensor>),
                send: goes.then(|| Box::new(send) as Box<dyn FnOnce(CubeTensor)>),
            }
        }

        fn finish(&self, _near: &CubeTensor) {}
    }

    /// Rows of 201 tokens, which do not fall into four equal parts, for models of four heads.
    fn four_heads() -> TrainConfig {
        let model = ModelConfig {
            vocab_size: 512,
            decoder_embed_dim: 128,
            decoder_layers: 3,
            decoder_attention_heads: 4,
            hidden_dim: 128,
            glu_dim: 384,
            linear_use_lrpe_list: vec![1, 0, 0],
            ..ModelConfig::default()
        };
        TrainConfig {
            sequence_length: 201,
            batch: 2,
            gradient_accumulation: 2,
            precision: Precision::Bf16,
            z_loss: 1e-3,
            model,
            ..TrainConfig::default()
        }
    }

    fn four_rows(stream: u64) -> Batch {
        let mut rng = Rng::new(21, stream);
        let tokens = (0..4 * 202).map(|_| (rng.next_u64() % 512) as u32).collect();
        Batch { tokens, starts: vec![vec![0, 64, 150], vec![0, 63, 129], vec![0], vec![0, 100]], length: 201 }
    }

    /// As far as bf16 is from float32, which tests/mixed.rs measured.
    fn most(parameter: &Parameter) -> f64 {
        if parameter.name.ends_with("theta") || parameter.name.contains("qkvu") { 5e-2 } else { 2.5e-2 }
    }

    /// The values of a rank's part to their places in the whole model; what several ranks have is the same on all.
    fn put_together<'a>(config: &TrainConfig, parts: usize, of_ranks: impl Iterator<Item = &'a Vec<f32>>) -> Vec<f32> {
        let mut whole = vec![f32::NAN; config.model.parameters()];
        for (rank, values) in of_ranks.enumerate() {
            for parameter in ParameterList::part(&config.model, rank, parts).iter() {
                let places = parameter.place.ranges(0..parameter.range().len()).flatten();
                for (place, value) in places.zip(&values[parameter.range()]) {
                    let there = whole[place];
                    assert!(
                        there.is_nan() || there.to_bits() == value.to_bits(),
                        "{}: {there} {value}",
                        parameter.name
                    );
                    whole[place] = *value;
                }
            }
        }
        whole
    }

    #[test]
    fn parts_of_blocks_that_have_no_kernel_are_refused() {
        let mut config = four_heads();
        assert_eq!(weights::shared(&config.model, 4).unwrap(), config.model.part(4).unwrap());
        config.model.glu_dim = 392;
        assert_eq!(Mixed::check(&config), Ok(()));
        assert!(weights::shared(&config.model, 1).is_ok());
        let refused = |parts| weights::shared(&config.model, parts).unwrap_err().to_string();
        let (of_two, of_three) = (refused(2), refused(3));
        let end = "model.glu_dim is 196 for each of 2 GPUs that share a block";
        assert!(of_two.starts_with("tensor_ranks: ") && of_two.ends_with(end), "{of_two}");
        assert!(of_three.contains("4 heads"), "{of_three}");
        let Some(device) = cuda_device("refused parts") else { return };
        for precision in [Precision::Bf16, Precision::Auto] {
            let shared = TrainConfig { precision, tensor_ranks: 2, ..config.clone() };
            let started = |group: Arc<dyn parallel::Collective>| {
                let team = Team::new(&group, &shared).unwrap();
                let values = initial_shard(&shared.model, 3, &team.partition(&shared).places(0));
                let error = super::super::start(&shared, &device, &group, Snapshot::fresh(values)).err();
                group.leave(None);
                error.unwrap().to_string()
            };
            assert!(together(2, started).iter().all(|error| *error == of_two), "{precision:?}");
        }
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn ranks_that_share_blocks_take_the_steps_of_one() {
        let Some(device) = cuda_device("shared blocks") else { return };
        let config = four_heads();
        // After one step the first moment is the gradient times a constant.
        let run = |group: Arc<dyn parallel::Collective>, config: &TrainConfig| {
            let team = Team::new(&group, config).unwrap();
            let values = initial_shard(&config.model, 3, &team.partition(config).places(0));
            let shared = team.tensor.world() > 1;
            let partners = shared.then(|| Box::new(ByHost::over(&team.tensor)) as Box<dyn Partners>);
            let links = Links { gpus: None, line: None, partners };
            let mut engine = Mixed::with(config, &device, team, Snapshot::fresh(values), links).unwrap();
            engine.step(&four_rows(1), 1e-3).unwrap();
            let first = (engine.outcome().unwrap(), engine.snapshot().unwrap()().unwrap());
            engine.step(&four_rows(2), 1e-3).unwrap();
            let second = (engine.outcome().unwrap(), engine.snapshot().unwrap()().unwrap());
            let held_out = engine.loss(&four_rows(3)).unwrap();
            let logits = engine.reader().unwrap().map(|mut reader| reader.read(&[1, 2, 3]).unwrap());
            group.leave(None);
            (first, second, held_out, logits)
        };
        let one = run(Alone::shared(), &config);
        for parts in [2, 4] {
            let shared = TrainConfig { tensor_ranks: parts, ..config.clone() };
            let ranks = together(parts, |group| run(group, &shared));
            for (first, second, held_out, _) in &ranks {
                assert_eq!((first.0, second.0, *held_out), (ranks[0].0.0, ranks[0].1.0, ranks[0].2), "{parts}");
            }
            let near = |what: &str, got: f64, want: f64, most: f64| {
                eprintln!("{parts} ranks: {what} {got}, of one {want}");
                assert!((got / want - 1.0).abs() < most, "{parts}: {what} {got} {want}");
            };
            for (of_ranks, of_one) in [(&ranks[0].0.0, &one.0.0), (&ranks[0].1.0, &one.1.0)] {
                near("loss", of_ranks.loss, of_one.loss, 1e-3);
                near("norm", of_ranks.grad_norm, of_one.grad_norm, 1e-2);
            }
            near("held-out loss", ranks[0].2, one.2, 1e-3);
            let gradient = put_together(&shared, parts, ranks.iter().map(|rank| &rank.0.1.first));
            for parameter in ParameterList::of(&config.model).iter() {
                let error = relative(&gradient[parameter.range()], &one.0.1.first[parameter.range()]);
                eprintln!("{parts} ranks: {}: gradient off by {error:.2e}", parameter.name);
                assert!(error < most(parameter), "{parts}: {}: {error}", parameter.name);
            }
            let values = put_together(&shared, parts, ranks.iter().map(|rank| &rank.1.1.values));
            let error = relative(&values, &one.1.1.values);
            assert!(error < 1e-2, "{parts}: values after two steps {error}");
            let [got, want] = [&ranks[0].3, &one.3].map(|logits| logits.as_deref().unwrap());
            assert!(relative(got, want) < 2.5e-2, "{parts}: logits {}", relative(got, want));
            assert!(ranks[1..].iter().all(|rank| rank.3.is_none()));
            let again = TrainConfig { activation_checkpointing: Recompute::Full, ..shared };
            let again = together(parts, |group| run(group, &again));
            assert!(again == ranks, "{parts}: blocks made again have the same bits");
        }
    }

    /// The ways that ranks take who share what they have of a model: NCCL is there, with one rank in each group, and only the
    /// sums over partners go over the host.
    #[test]
    #[allow(clippy::print_stderr)]
    fn ranks_that_share_blocks_have_the_same_bits_with_every_sharding() {
        type Made = (Outcome, Outcome, f64, Option<Vec<f32>>, Snapshot, u64);
        let Some(device) = cuda_device("shared blocks, sharded") else { return };
        if let Err(reason) = &cuda::libraries::find().collectives.found {
            eprintln!("shared blocks, sharded: {reason}");
            return;
        }
        // Norms are added up in pieces of each kind of sharding: they may not show in the step.
        let optimizer = OptimizerConfig { clip_norm: 1e6, ..OptimizerConfig::default() };
        let base = TrainConfig { tensor_ranks: 2, optimizer, ..four_heads() };
        let configs: Vec<TrainConfig> = [GradientReduction::Float32, GradientReduction::Bf16]
            .into_iter()
            .flat_map(|gradient_reduction| [1, 2].map(|rounds| (gradient_reduction, rounds)))
            .flat_map(|(gradient_reduction, rounds)| {
                let mut config = TrainConfig {
                    gradient_reduction,
                    batch: 4 / rounds,
                    gradient_accumulation: rounds,
                    ..base.clone()
                };
                config.optimizer.moments = if rounds == 1 { Moments::Float32 } else { Moments::Bf16 };
                Sharding::ALL.map(|sharding| TrainConfig { sharding, ..config.clone() })
            })
            .collect();
        let run = |group: Arc<dyn parallel::Collective>| -> Vec<Made> {
            let near = cuda::of(Tensor::<1>::zeros([8], &device));
            let alone = Team::new(&Alone::shared(), &TrainConfig { tensor_ranks: 1, ..base.clone() }).unwrap();
            let mut joined = None;
            // One after the other: each is a group of its own.
            for turn in 0..group.world() {
                if turn == group.rank() {
                    joined = Some(Arc::new(Gpus::join(&near, &alone).unwrap()));
                }
                group.exchange(&[]).unwrap();
            }
            let start = |config: &TrainConfig, snapshot: Snapshot| {
                let team = Team::new(&group, config).unwrap();
                let partners = ByHost { group: team.tensor.clone(), gpus: joined.clone() };
                let links = Links { gpus: joined.clone(), line: None, partners: Some(Box::new(partners)) };
                Mixed::with(config, &device, team, snapshot, links).unwrap()
            };
            let of = |config: &TrainConfig| {
                let team = Team::new(&group, config).unwrap();
                let values = initial_shard(&config.model, 3, &team.partition(config).places(0));
                let mut engine = start(config, Snapshot::fresh(values));
                engine.step(&four_rows(1), 1e-3).unwrap();
                let (first, saved) = (engine.outcome().unwrap(), engine.snapshot().unwrap()().unwrap());
                engine.step(&four_rows(2), 1e-3).unwrap();
                let (second, last) = (engine.outcome().unwrap(), engine.snapshot().unwrap()().unwrap());
                let held_out = engine.loss(&four_rows(3)).unwrap();
                let logits = engine.reader().unwrap().map(|mut reader| reader.read(&[1, 2, 3]).unwrap());
                let states = engine.state_bytes().unwrap();
                drop(engine);
                let mut again = start(config, saved);
                again.step(&four_rows(2), 1e-3).unwrap();
                assert_eq!((again.outcome().unwrap(), again.state_bytes().unwrap()), (second, states));
                assert!(again.snapshot().unwrap()().unwrap() == last, "going on from a snapshot has the same bits");
                (first, second, held_out, logits, last, states)
            };
            let made = configs.iter().map(of).collect();
            drop(joined);
            group.leave(None);
            made
        };
        let ranks = together(2, run);
        for (number, config) in configs.iter().enumerate() {
            let what = format!(
                "{:?}, {:?}, {} rounds",
                config.sharding, config.gradient_reduction, config.gradient_accumulation
            );
            let [own, other] = [0, 1].map(|rank| &ranks[rank][number]);
            assert_eq!((own.0, own.1, own.2), (other.0, other.1, other.2), "{what}");
            // Of embedding and head both have the same bits.
            let whole = |values: fn(&Snapshot) -> &Vec<f32>| {
                put_together(config, 2, ranks.iter().map(|rank| values(&rank[number].4)))
            };
            let parts: [fn(&Snapshot) -> &Vec<f32>; 3] = [|made| &made.values, |made| &made.first, |made| &made.second];
            for values in parts {
                assert!(whole(values).iter().all(|value| value.is_finite()), "{what}");
            }
            // The first of its four kinds of sharding is `none`.
            let none = number - number % Sharding::ALL.len();
            eprintln!("{what}: loss {}, norm {}, held out {}, {} bytes", own.1.loss, own.1.grad_norm, own.2, own.5);
            for rank in &ranks {
                let (got, want) = (&rank[number], &rank[none]);
                assert_eq!((got.0.loss, got.1.loss, got.2), (want.0.loss, want.1.loss, want.2), "{what}");
                assert!((got.1.grad_norm / want.1.grad_norm - 1.0).abs() < 1e-6, "{what}");
                assert!(got.3 == want.3 && got.4 == want.4, "{what}: the bits of `none`");
            }
        }
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn ranks_that_share_blocks_and_rows_have_the_gradients_of_one() {
        let Some(device) = cuda_device("shared blocks and rows") else { return };
        let config = four_heads();
        // The gradient of this rank's part, and the losses.
        let run = |group: Arc<dyn parallel::Collective>, config: &TrainConfig| {
            let mut team = Team::new(&group, config).unwrap();
            // What ranks with the same part would add up is added below.
            (team.inner, team.outer) = (Alone::shared(), Alone::shared());
            let values = initial_shard(&config.model, 3, &team.partition(config).places(0));
            let of = |group: &Arc<dyn parallel::Collective>| (group.world() > 1).then(|| Box::new(ByHost::over(group)));
            let links = Links {
                gpus: None,
                line: of(&team.sequence).map(|line| line as Box<dyn Line>),
                partners: of(&team.tensor).map(|partners| partners as Box<dyn Partners>),
            };
            let engine = Mixed::with(config, &device, team, Snapshot::fresh(values), links).unwrap();
            engine.accumulate(&four_rows(1)).unwrap();
            let losses: f32 = cuda::download_floats(&engine.losses).unwrap().iter().sum();
            let gradient = made(&engine).0;
            group.leave(None);
            (gradient, losses)
        };
        let (want, loss) = run(Alone::shared(), &config);
        let shared = TrainConfig { tensor_ranks: 2, sequence_ranks: 2, ..config.clone() };
        // Ranks 0 and 1 share the blocks for the first tokens of the rows, 2 and 3 for the others.
        let ranks = together(4, |group| run(group, &shared));
        let sum = |part: usize| -> Vec<f32> {
            ranks[part].0.iter().zip(&ranks[part + 2].0).map(|(first, second)| first + second).collect()
        };
        let got = put_together(&shared, 2, [sum(0), sum(1)].iter());
        let losses = ranks[0].1 + ranks[2].1;
        assert!((losses - loss).abs() < 1e-3 * loss, "{losses} {loss}");
        for parameter in ParameterList::of(&config.model).iter() {
            let error = relative(&got[parameter.range()], &want[parameter.range()]);
            eprintln!("{}: gradient off by {error:.2e}", parameter.name);
            assert!(error < most(parameter), "{}: {error}", parameter.name);
        }
        let again = TrainConfig { activation_checkpointing: Recompute::Full, ..shared };
        assert!(together(4, |group| run(group, &again)) == ranks, "blocks made again have the same bits");
    }
}
