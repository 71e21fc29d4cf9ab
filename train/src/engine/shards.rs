//! What a GPU holds of weights and gradients when several train one model, and what goes between them.
//!
//! Every bucket has as many pieces as there are ranks that share one copy, one for each, padded to one size. A buffer of *all* holds all
//! pieces of all buckets, bucket after bucket; a buffer of *own* the pieces of this rank. NCCL gathers a bucket from the
//! one into the other and scatters sums the other way.
//!
//! | `sharding` | weights bf16 | gradient | weights and moments float32 |
//! | --- | --- | --- | --- |
//! | `none` | all | all | all |
//! | `optimizer` | all | all | own |
//! | `gradients` | all | own, two buckets at a time | own |
//! | `full` | own, two buckets at a time | own, two buckets at a time | own |
//!
//! Gradients are made in float32 and kept in what they are added up in over the ranks. Those of several micro batches are
//! added up where they are made, without a word between the ranks: then the gradient is kept whole and in float32 in
//! every mode.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::block::Gradients;
use super::partners::{Coming, Partners};
use super::weights::Plan;
use crate::config::{GradientReduction, Sharding};
use crate::cuda::{self, Collective, Ticket, Work};
use crate::ops::adamw;
use crate::ops::weight::GradientSum;
use crate::parallel::Partition;
use crate::parallel::nccl::{Gpus, Sum};

/// Where buckets and pieces lie in buffers of all and of own.
#[derive(Clone, Debug)]
pub(super) struct Room {
    partition: Partition,
    rank: usize,
    /// Where the piece of each bucket begins in a buffer of own, and the end of the last.
    begins: Vec<usize>,
}

impl Room {
    pub(super) fn new(partition: Partition, rank: usize) -> Self {
        let mut begins = vec![0];
        for bucket in 0..partition.buckets().len() {
            begins.push(begins[bucket] + partition.padded_piece(bucket));
        }
        Self { partition, rank, begins }
    }

    pub(super) fn buckets(&self) -> usize {
        self.partition.buckets().len()
    }

    fn world(&self) -> usize {
        self.partition.world()
    }

    /// Values of a buffer of own.
    pub(super) fn own_len(&self) -> usize {
        self.begins[self.buckets()]
    }

    /// Values of a buffer of all.
    pub(super) fn all_len(&self) -> usize {
        self.world() * self.own_len()
    }

    /// Values of a piece with its padding.
    fn padded(&self, bucket: usize) -> usize {
        self.partition.padded_piece(bucket)
    }

    /// Values of the largest bucket with its padding.
    fn largest(&self) -> usize {
        (0..self.buckets()).map(|bucket| self.world() * self.padded(bucket)).max().unwrap_or(0)
    }

    /// What this rank has of a bucket, counted from the beginning of the bucket.
    pub(super) fn piece(&self, bucket: usize) -> Range<usize> {
        self.partition.piece(bucket, self.rank)
    }

    /// Whether other ranks have other parts of this bucket's parameters.
    pub(super) fn is_split(&self, bucket: usize) -> bool {
        self.partition.is_split(bucket)
    }

    /// The bucket as a range of the parameters' list.
    pub(super) fn range(&self, bucket: usize) -> Range<usize> {
        self.partition.buckets()[bucket].range.clone()
    }

    /// A bucket with its padding in a buffer of all.
    pub(super) fn bucket(&self, all: &CubeTensor, bucket: usize) -> CubeTensor {
        let world = self.world();
        cuda::flat_view(all, world * self.begins[bucket], [world * self.padded(bucket)])
    }

    /// This rank's piece with its padding, of a bucket alone.
    fn own_of(&self, values: &CubeTensor, bucket: usize) -> CubeTensor {
        let padded = self.padded(bucket);
        cuda::flat_view(values, self.rank * padded, [padded])
    }

    /// This rank's piece with its padding in a buffer of own.
    pub(super) fn own(&self, own: &CubeTensor, bucket: usize) -> CubeTensor {
        cuda::flat_view(own, self.begins[bucket], [self.padded(bucket)])
    }

    /// Pieces without padding, one after the other, as they stand in a buffer of own.
    pub(super) fn pad(&self, values: Vec<f32>) -> Vec<f32> {
        if values.len() == self.own_len() {
            return values;
        }
        let mut padded = Vec::with_capacity(self.own_len());
        let mut rest = &values[..];
        for bucket in 0..self.buckets() {
            let (piece, after) = rest.split_at(self.piece(bucket).len());
            padded.extend(piece);
            padded.resize(self.begins[bucket + 1], 0.0);
            rest = after;
        }
        padded
    }
}

/// The first `count` values of a flat buffer.
pub(super) fn first(values: &CubeTensor, count: usize) -> CubeTensor {
    cuda::flat_view(values, 0, [count])
}

/// The weights in bf16.
pub(super) struct Working {
    room: Room,
    gpus: Option<Arc<Gpus>>,
    held: Held,
}

enum Held {
    /// Of all, with what is on its way into each bucket.
    All { all: CubeTensor, coming: RefCell<Vec<Option<Ticket>>> },
    /// Of own, and the buckets that were gathered.
    Own { own: CubeTensor, gathered: Box<RefCell<Gathered>> },
}

/// Two buckets: the one in use and the next.
struct Gathered {
    slots: [Slot; 2],
    /// The slot in use.
    used: usize,
}

struct Slot {
    buffer: CubeTensor,
    bucket: Option<usize>,
    coming: Option<Ticket>,
}

impl Gathered {
    fn new(near: &CubeTensor, len: usize) -> Self {
        let slot = || Slot { buffer: cuda::lasting(near, [len], DType::BF16), bucket: None, coming: None };
        Self { slots: [slot(), slot()], used: 0 }
    }

    fn find(&self, bucket: usize) -> Option<usize> {
        self.slots.iter().position(|slot| slot.bucket == Some(bucket))
    }

    /// Begins to gather `bucket` into the slot that is not in use.
    fn gather(&mut self, room: &Room, gpus: &Gpus, own: &CubeTensor, bucket: usize) -> usize {
        let at = 1 - self.used;
        let slot = &mut self.slots[at];
        if let Some(ticket) = slot.coming.take() {
            ticket.wait(own);
        }
        let to = first(&slot.buffer, room.world() * room.padded(bucket));
        slot.coming = Some(gpus.start(Collective::AllGather, &room.own(own, bucket), &to));
        slot.bucket = Some(bucket);
        at
    }
}

impl Working {
    /// Room for the weights; their values are to be written.
    pub(super) fn new(room: &Room, gpus: Option<Arc<Gpus>>, sharding: Sharding, near: &CubeTensor) -> Self {
        let held = match sharding {
            Sharding::Full => Held::Own {
                own: cuda::lasting(near, [room.own_len()], DType::BF16),
                gathered: Box::new(RefCell::new(Gathered::new(near, room.largest()))),
            },
            _ => Held::All {
                all: cuda::lasting(near, [room.all_len()], DType::BF16),
                coming: RefCell::new((0..room.buckets()).map(|_| None).collect()),
            },
        };
        Self { room: room.clone(), gpus, held }
    }

    /// Bytes of the weights that are held here, those that come and go included.
    pub(super) fn bytes(&self) -> u64 {
        match &self.held {
            Held::All { all, .. } => cuda::bytes(all),
            Held::Own { own, gathered } => {
                cuda::bytes(own) + gathered.borrow().slots.iter().map(|slot| cuda::bytes(&slot.buffer)).sum::<u64>()
            }
        }
    }

    fn gpus(&self) -> &Gpus {
        self.gpus.as_ref().unwrap_or_else(|| unreachable!("pieces are held where there are GPUs to gather them from"))
    }

    /// A bucket to be used until the next but one is asked for. `then` is the one that will be asked for next.
    pub(super) fn bucket(&self, bucket: usize, then: Option<usize>) -> CubeTensor {
        match &self.held {
            Held::All { all, coming } => {
                if let Some(ticket) = coming.borrow_mut()[bucket].take() {
                    ticket.wait(all);
                }
                self.room.bucket(all, bucket)
            }
            Held::Own { own, gathered } => {
                let mut gathered = gathered.borrow_mut();
                let at = match gathered.find(bucket) {
                    Some(at) => at,
                    None => gathered.gather(&self.room, self.gpus(), own, bucket),
                };
                gathered.used = at;
                let slot = &mut gathered.slots[at];
                if let Some(ticket) = slot.coming.take() {
                    ticket.wait(own);
                }
                let values = first(&slot.buffer, self.room.world() * self.room.padded(bucket));
                if let Some(next) = then
                    && gathered.find(next).is_none()
                {
                    gathered.gather(&self.room, self.gpus(), own, next);
                }
                values
            }
        }
    }

    /// This rank's piece of a bucket with its padding, to be written.
    pub(super) fn own(&self, bucket: usize) -> CubeTensor {
        match &self.held {
            Held::All { all, .. } => self.room.own_of(&self.room.bucket(all, bucket), bucket),
            Held::Own { own, .. } => self.room.own(own, bucket),
        }
    }

    /// A bucket with its padding, to be written; where every rank writes all of it.
    pub(super) fn all(&self) -> Option<&CubeTensor> {
        match &self.held {
            Held::All { all, .. } => Some(all),
            Held::Own { .. } => None,
        }
    }

    /// After this rank's piece of a bucket was written: begins to give it to the others, or forgets what was gathered of it.
    pub(super) fn written(&self, bucket: usize) {
        match &self.held {
            Held::All { all, coming } => {
                let whole = self.room.bucket(all, bucket);
                let ticket = self.gpus().start(Collective::AllGather, &self.room.own_of(&whole, bucket), &whole);
                if let Some(before) = coming.borrow_mut()[bucket].replace(ticket) {
                    before.wait(all);
                }
            }
            Held::Own { gathered, .. } => {
                for slot in gathered.borrow_mut().slots.iter_mut().filter(|slot| slot.bucket == Some(bucket)) {
                    slot.bucket = None;
                }
            }
        }
    }

    /// All weights, gathered for this bucket by bucket where they are not there. All ranks call it; without `keep` a rank only
    /// gives the others what they need.
    pub(super) fn gathered(&self, keep: bool) -> Option<CubeTensor> {
        let buckets = self.room.buckets();
        let own = match &self.held {
            Held::All { all, .. } => {
                (0..buckets).for_each(|bucket| drop(self.bucket(bucket, None)));
                return keep.then(|| all.clone());
            }
            Held::Own { own, .. } => own,
        };
        let all = keep.then(|| cuda::empty(own, [self.room.all_len()], DType::BF16));
        for bucket in 0..buckets {
            let values = self.bucket(bucket, Some(bucket + 1).filter(|next| *next < buckets));
            if let Some(all) = &all {
                let mut work = Work::near(own);
                work.copy(&values, &self.room.bucket(all, bucket));
                work.submit();
            }
        }
        all
    }
}

/// Sums of the gradients of a bucket.
#[derive(Clone, Debug)]
pub(super) enum Sums {
    /// Of the embedding or the head.
    Table(Box<GradientSum>),
    /// Of a block.
    Block(Box<Gradients>),
}

impl Sums {
    fn new(plan: &Plan, bucket: usize, values: &CubeTensor) -> Self {
        if bucket == 0 || bucket == plan.head() {
            Self::Table(Box::new(GradientSum::new(plan.table(bucket, values))))
        } else {
            Self::Block(Box::new(plan.gradients(bucket - 1, values)))
        }
    }

    fn each(&self) -> Vec<&GradientSum> {
        match self {
            Self::Table(sum) => vec![sum],
            Self::Block(sums) => sums.sums().collect(),
        }
    }

    /// Fills with zeros what nothing was added to.
    fn complete(&self, work: &mut Work) {
        for sum in self.each() {
            let (buffer, begun) = sum.next();
            if !begun {
                work.zero(buffer);
            }
        }
    }
}

/// The gradients of this rank's part of the batch, and how they become those of the batch.
pub(super) struct Reduction {
    room: Room,
    gpus: Option<Arc<Gpus>>,
    /// Every rank takes the whole step: all gradients are added up on all.
    everywhere: bool,
    /// What goes between the ranks is bf16.
    narrow: bool,
    /// Two buckets in bf16 where they are made to be sent and not to be kept, which are used in turn.
    narrowed: Option<[CubeTensor; 2]>,
    next_narrowed: Cell<usize>,
    /// The gradient, of all or of own.
    kept: CubeTensor,
    keeps_all: bool,
    place: Place,
    flying: RefCell<VecDeque<Flight>>,
}

enum Place {
    /// Gradients are made where they are kept.
    Sums(Vec<Sums>),
    /// Gradients are made bucket by bucket elsewhere, and sent at once.
    Slots(Box<Slots>),
}

/// Two buckets in float32, one for the gradients that are being made, one for those that are sent.
struct Slots {
    slots: [CubeTensor; 2],
    next: Cell<usize>,
    open: RefCell<Option<(Sums, CubeTensor)>>,
}

/// A reduction on its way.
#[derive(Default)]
struct Flight {
    sum: Option<Sum>,
    /// And over the ranks that share the blocks.
    of_partners: Option<Coming>,
    /// The sum, where other ranks have the same and may have other bits of it.
    level: Option<CubeTensor>,
    /// What arrived in bf16, and where it goes.
    widen: Option<(CubeTensor, CubeTensor)>,
}

impl Reduction {
    /// For steps of `rounds` micro batches on every rank.
    pub(super) fn new(
        room: &Room,
        plan: &Plan,
        gpus: Option<Arc<Gpus>>,
        sharding: Sharding,
        reduction: GradientReduction,
        rounds: usize,
        near: &CubeTensor,
    ) -> Self {
        let narrow = reduction == GradientReduction::Bf16 && gpus.is_some();
        let few = matches!(sharding, Sharding::None | Sharding::Optimizer);
        let apart = rounds == 1 && (narrow || !few);
        let keeps_all = few || !apart;
        let empty = |len, dtype| cuda::lasting(near, [len], dtype);
        let len = if keeps_all { room.all_len() } else { room.own_len() };
        let kept = empty(len, if narrow && apart { DType::BF16 } else { DType::F32 });
        let place = if apart {
            Place::Slots(Box::new(Slots {
                slots: [(); 2].map(|()| empty(room.largest(), DType::F32)),
                next: Cell::new(0),
                open: RefCell::new(None),
            }))
        } else {
            let sums = (0..room.buckets()).map(|bucket| Sums::new(plan, bucket, &room.bucket(&kept, bucket)));
            Place::Sums(sums.collect())
        };
        let narrowed = (narrow && !(apart && keeps_all)).then(|| [(); 2].map(|()| empty(room.largest(), DType::BF16)));
        Self {
            room: room.clone(),
            gpus,
            everywhere: sharding == Sharding::None,
            narrow,
            narrowed,
            next_narrowed: Cell::new(0),
            kept,
            keeps_all,
            place,
            flying: RefCell::default(),
        }
    }

    /// Bytes of the gradients that are held here, and of those that are made or sent bucket by bucket.
    pub(super) fn bytes(&self) -> u64 {
        let made = match &self.place {
            Place::Sums(_) => 0,
            Place::Slots(to) => to.slots.iter().map(cuda::bytes).sum(),
        };
        cuda::bytes(&self.kept) + made + self.narrowed.iter().flatten().map(cuda::bytes).sum::<u64>()
    }

    /// Forgets all sums, for the first micro batch of a step.
    pub(super) fn restart(&self) {
        if let Place::Sums(sums) = &self.place {
            sums.iter().flat_map(Sums::each).for_each(GradientSum::restart);
        }
    }

    /// The sums of a bucket, which are asked for bucket by bucket.
    pub(super) fn sums(&self, plan: &Plan, bucket: usize) -> Sums {
        match &self.place {
            Place::Sums(sums) => sums[bucket].clone(),
            Place::Slots(to) => {
                if !self.narrow {
                    // What is sent from this slot has to be gone.
                    self.land(1);
                }
                let next = to.next.replace(1 - to.next.get());
                let slot = first(&to.slots[next], self.room.world() * self.room.padded(bucket));
                let sums = Sums::new(plan, bucket, &slot);
                to.open.replace(Some((sums.clone(), slot)));
                sums
            }
        }
    }

    /// After the last gradient was added to the sums of a bucket: begins to add them up over the ranks; over `partners`, too, where
    /// they all have the bucket and each has made a part of its gradient. That sum comes last: it is one sum for all
    /// partners, while what went before may have been added up in another order beside each of them.
    pub(super) fn reduce(&self, bucket: usize, partners: Option<&dyn Partners>) {
        let (sums, made) = match &self.place {
            Place::Sums(sums) => (sums[bucket].clone(), self.room.bucket(&self.kept, bucket)),
            Place::Slots(from) => {
                let Some(made) = from.open.take() else { unreachable!("its sums were asked for before") };
                made
            }
        };
        let mut work = Work::near(&made);
        sums.complete(&mut work);
        work.submit();
        let Some(gpus) = &self.gpus else {
            let flight =
                |partners: &dyn Partners| Flight { of_partners: Some(partners.add_up(&made)), ..Flight::default() };
            self.flying.borrow_mut().extend(partners.map(flight));
            return;
        };
        // Where the sum arrives of what is sent.
        let part = |sent: &CubeTensor| match self.everywhere {
            true => sent.clone(),
            false => self.room.own_of(sent, bucket),
        };
        let (sent, to, widen) = match &self.place {
            Place::Sums(_) if self.narrow => {
                let narrow = self.narrowed(&made);
                let to = part(&narrow);
                (narrow, to.clone(), Some((to, part(&made))))
            }
            Place::Sums(_) => (made.clone(), part(&made), None),
            Place::Slots(_) if self.keeps_all => {
                let whole = self.room.bucket(&self.kept, bucket);
                adamw::narrow(&made, &whole);
                (whole.clone(), part(&whole), None)
            }
            Place::Slots(_) => {
                let sent = if self.narrow { self.narrowed(&made) } else { made };
                (sent, self.room.own(&self.kept, bucket), None)
            }
        };
        let collective = if self.everywhere { Collective::AllReduce } else { Collective::ReduceScatter };
        let sum = Some(gpus.add_up(collective, &sent, &to));
        let of_partners = partners.map(|partners| partners.add_up(&to));
        // Other ranks that have the same piece add up their own partners: three and more numbers maybe in another order. Of
        // the embedding's all but one are zeros.
        let orders = bucket > 0 && partners.is_some_and(|partners| partners.world() > 2);
        let level = orders.then_some(to);
        self.flying.borrow_mut().push_back(Flight { sum, of_partners, level, widen });
    }

    /// A copy in bf16, to be sent; two of them are there at once.
    fn narrowed(&self, made: &CubeTensor) -> CubeTensor {
        // What was sent from this one has to be gone.
        self.land(1);
        let Some(slots) = &self.narrowed else { unreachable!("gradients that are sent in bf16 have their room") };
        let next = self.next_narrowed.replace(1 - self.next_narrowed.get());
        let narrow = first(&slots[next], made.meta.shape().num_elements());
        adamw::narrow(made, &narrow);
        narrow
    }

    /// Lets what comes later wait for all but the last `left` reductions.
    fn land(&self, left: usize) {
        let mut flying = self.flying.borrow_mut();
        while flying.len() > left
            && let Some(Flight { sum, of_partners, level, widen }) = flying.pop_front()
        {
            if let Some(sum) = sum {
                sum.wait(&self.kept);
            }
            if let Some(of_partners) = of_partners {
                of_partners();
            }
            let level = self.gpus.as_ref().zip(level);
            if let Some(ticket) = level.and_then(|(gpus, values)| gpus.level(&values, self.everywhere)) {
                ticket.wait(&self.kept);
            }
            if let Some((from, to)) = widen {
                adamw::widen(&from, &to);
            }
        }
    }

    /// Lets what comes later wait for all reductions.
    pub(super) fn finish(&self) {
        self.land(0);
    }

    /// All gradients, where they are kept.
    pub(super) fn all(&self) -> Option<&CubeTensor> {
        self.keeps_all.then_some(&self.kept)
    }

    /// The gradient that this rank takes the step with: of its piece of a bucket, with padding.
    pub(super) fn own(&self, bucket: usize) -> CubeTensor {
        match self.all() {
            Some(all) => self.room.own_of(&self.room.bucket(all, bucket), bucket),
            None => self.room.own(&self.kept, bucket),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    #[test]
    fn pieces_are_padded_to_where_buffers_of_own_have_them() {
        let config =
            ModelConfig { vocab_size: 300, decoder_embed_dim: 128, decoder_layers: 2, ..ModelConfig::default() };
        for world in [1, 3, 8] {
            for rank in 0..world {
                let partition = Partition::new(&config, world);
                let room = Room::new(partition.clone(), rank);
                assert_eq!(room.all_len(), world * room.own_len());
                let values: Vec<f32> = partition.shard(rank).into_iter().flatten().map(|at| at as f32).collect();
                let padded = room.pad(values);
                assert_eq!(padded.len(), room.own_len());
                for bucket in 0..room.buckets() {
                    let piece = room.piece(bucket);
                    let own = &padded[room.begins[bucket]..room.begins[bucket + 1]];
                    let want = piece.clone().map(|at| (room.range(bucket).start + at) as f32);
                    assert!(own[..piece.len()].iter().copied().eq(want), "{world} {rank} {bucket}");
                    assert!(own[piece.len()..].iter().all(|&value| value == 0.0));
                }
            }
        }
    }
}
