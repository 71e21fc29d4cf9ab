//! Lightning Attention on CUDA: how `lightning.cu` (bf16 and float16, tensor cores) and
//! `lightning_any.cu` (float32 arithmetic, any type, width and place) are launched.
//!
//! Both read and write tensors where they are, as [`Heads`]: columns of a projection or tensors of
//! their own. Which kernel runs depends on types, widths and addresses alone, so equal calls give
//! equal bits.

use std::ops::Range;

use burn::tensor::DType;
use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;

use crate::Error;
use crate::cuda::{self, Argument, Grid, Kernel, Source, Swizzle, Tiles, Work};

pub(crate) static SOURCE: Source = Source { name: "lightning.cu", text: include_str!("../../kernels/lightning.cu") };
pub(crate) static ANY: Source =
    Source { name: "lightning_any.cu", text: include_str!("../../kernels/lightning_any.cu") };

/// Tokens of a chunk in `lightning.cu`.
pub const CHUNK: usize = TILE;
/// Tokens of a chunk, and columns that one group of threads owns, in `lightning.cu`.
const TILE: usize = 64;
/// Bytes of a tile in shared memory.
const BOX: usize = 8192;
/// Columns of a block of `lightning_any.cu`.
const ANY_COLUMNS: usize = 32;
/// Rows shorter than this go to `lightning_any.cu`: one chunk has nothing to gain from tensor cores,
/// and where only a few products are summed, rounding a score is not averaged away.
const SHORTEST: usize = TILE;

/// A tensor `[B, H, T, width]` somewhere in a buffer, the values of one head of one token in a row.
#[derive(Clone, Debug)]
pub struct Heads {
    buffer: CubeTensor,
    dims: [usize; 4],
    /// Values from one row, head and token to the next.
    strides: [usize; 3],
}

impl Heads {
    /// A tensor of its own, `[B, H, T, width]` in any order but with the last axis in one piece.
    ///
    /// # Panics
    /// When it has other than four axes or its last one is not in one piece.
    pub fn of(tensor: CubeTensor) -> Self {
        let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
        assert!(shape.num_dims() == 4 && (strides[3] == 1 || shape[3] == 1), "no heads: {tensor:?}");
        let dims = [shape[0], shape[1], shape[2], shape[3]];
        let strides = [strides[0], strides[1], strides[2]];
        Self { buffer: tensor, dims, strides }
    }

    /// Columns `begin..begin + heads · width` of `matrix: [B·T, ..]`, head after head.
    ///
    /// # Panics
    /// When the matrix has fewer columns, or its rows are not `rows` times a whole number.
    pub fn columns(matrix: &CubeTensor, begin: usize, [rows, heads, width]: [usize; 3]) -> Self {
        let buffer = cuda::columns(matrix, begin, heads * width);
        let ([tokens, _], stride) = cuda::rows(&buffer);
        assert!(tokens.is_multiple_of(rows), "{tokens} tokens in {rows} rows");
        let length = tokens / rows;
        Self { buffer, dims: [rows, heads, length, width], strides: [length * stride, width, stride] }
    }

    /// `[B, H, T, width]`.
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// Where the values are.
    pub fn device(&self) -> &CubeDevice {
        &self.buffer.device
    }

    fn width(&self) -> usize {
        self.dims[3]
    }

    /// As the kernels are told.
    fn tiles(&self) -> Tiles {
        let bytes = self.buffer.dtype.size() as u64;
        let [rows, heads, tokens, width] = self.dims.map(|size| size as u64);
        let [row, head, token] = self.strides.map(|stride| stride as u64 * bytes);
        Tiles {
            dims: vec![width, tokens, heads, rows],
            strides: vec![token, head, row],
            tile: vec![TILE as u32, TILE as u32, 1, 1],
            swizzle: Swizzle::B128,
        }
    }

    /// Whether tiles can be copied in bulk: 16-bit numbers, everything at multiples of 16 bytes.
    fn has_tiles(&self) -> bool {
        let wide = |values: &usize| values.is_multiple_of(8);
        matches!(self.buffer.dtype, DType::BF16 | DType::F16)
            && cuda::aligned_to(&self.buffer, 16)
            && wide(&self.width())
            && self.strides.iter().all(wide)
    }
}

/// What forward and backward share.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// λ of every head: `[H]`, float32.
    pub decay: &'a CubeTensor,
    /// Position of every token in its document, `[B · T]`, where documents end inside rows; every row
    /// is (the continuation of) one document without them.
    pub positions: Option<&'a CubeTensor>,
    /// Whether queries and keys are taken through SiLU on the way in, and their gradients are those of
    /// what was before it.
    pub silu: bool,
}

/// Whether SiLU can ride in the kernel for `q` and `k` like this: it does in `lightning.cu` alone.
pub fn fuses_silu(q: &Heads, v: &Heads) -> bool {
    plan_width(q.width()) && plan_width(v.width()) && q.dims[2] >= SHORTEST && q.has_tiles() && v.has_tiles()
}

fn plan_width(width: usize) -> bool {
    width.div_ceil(TILE) <= 4
}

/// Whether the kernels take heads like `q` and `v` forward and backward: `lightning_any.cu` holds the state of 32 columns
/// in the shared memory of one block.
///
/// # Errors
/// [`Error::Input`] with the width, what it needs and the widest that fits the GPU at hand.
pub fn check_widths(q: &Heads, v: &Heads) -> Result<(), Error> {
    fits(q.width().max(v.width()), cuda::facts_of(&q.buffer).shared_per_block as usize)
}

/// Whether `width` values of x and y fit a block that may have `room` bytes of shared memory.
fn fits(width: usize, room: usize) -> Result<(), Error> {
    let needed = AnyPlan::shared(width);
    if needed <= room {
        return Ok(());
    }
    let widest = (1..width).rev().find(|&width| AnyPlan::shared(width) <= room).unwrap_or(0);
    Err(Error::Input(format!(
        "attention with heads of {width} values: the state of {ANY_COLUMNS} columns and a chunk take {needed} bytes of \
         shared memory, a block of this GPU has {room}; heads of at most {widest} values fit, so take more heads"
    )))
}

/// `o_t = Σ_{s≤t} exp(-λ(t-s)) (q_t·k_s) v_s` from the state `[B, H, K, V]` on, in float32 (zero
/// without one). Writes `o`, and the state after the last token where it is asked for.
///
/// # Panics
/// When shapes do not fit each other, `silu` is asked of a case that [`fuses_silu`] refuses, or heads are too wide
/// ([`check_widths`]).
pub fn forward(
    attention: &Attention<'_>,
    [q, k, v]: [&Heads; 3],
    o: &Heads,
    state: Option<&CubeTensor>,
    state_after: Option<&CubeTensor>,
) {
    check(q, k, v, o);
    let [_, heads, tokens, key] = q.dims;
    let value = v.width();
    let state_in = state.map_or_else(cuda::absent, cuda::read);
    let state_out = state_after.map_or_else(cuda::absent, cuda::write);
    let positions = attention.positions.map_or_else(cuda::absent, cuda::read);
    let mut work = Work::near(&o.buffer);
    let all = [q, k, v, o];
    if tokens >= SHORTEST && plan_width(key) && all.iter().all(|tensor| tensor.has_tiles()) {
        let plan = Plan::new(o, key, value, 1);
        let segments = plan.segments_buffer(o);
        let mut arguments: Vec<Argument<'_>> = all[..3].iter().map(|t| cuda::tiles(&t.buffer, t.tiles())).collect();
        arguments.push(cuda::tiles_out(&o.buffer, o.tiles()));
        arguments.extend([cuda::read(attention.decay), positions]);
        arguments.push(segments.as_ref().map_or_else(cuda::absent, cuda::update));
        arguments.extend([state_in, state_out, cuda::i32(key as i32), cuda::i32(value as i32)]);
        arguments.extend(plan.numbers(tokens, heads));
        plan.launch(&mut work, "lightning_forward", attention, &arguments);
    } else {
        assert!(!attention.silu, "SiLU rides in lightning.cu alone");
        let plan = AnyPlan::new(o, key, value, 1);
        let mut arguments: Vec<Argument<'_>> = all[..3].iter().map(|t| cuda::strided(&t.buffer, t.tiles())).collect();
        arguments.push(cuda::strided_out(&o.buffer, o.tiles()));
        arguments.extend([cuda::read(attention.decay), positions, state_in, state_out]);
        arguments.extend([key, value, tokens, heads, plan.groups].map(|n| cuda::i32(n as i32)));
        work.launch(&plan.kernel("lightning_any_forward"), plan.grid, &arguments);
    }
    work.submit();
}

/// States of the backward, `[B, H, K, V]` in float32.
#[derive(Clone, Copy, Debug, Default)]
pub struct States<'a> {
    /// The state that the forward began with.
    pub before: Option<&'a CubeTensor>,
    /// The gradient of the state after the last token.
    pub d_after: Option<&'a CubeTensor>,
    /// Where the gradient of the state before the first token goes.
    pub d_before: Option<&'a CubeTensor>,
}

/// Writes the gradients of q, k and v from that of o, and that of the state.
///
/// # Panics
/// As [`forward`].
pub fn backward(
    attention: &Attention<'_>,
    [q, k, v]: [&Heads; 3],
    d_o: &Heads,
    [d_q, d_k, d_v]: [&Heads; 3],
    states: States<'_>,
) {
    check(q, k, v, d_o);
    check(d_q, d_k, d_v, d_o);
    let [_, heads, tokens, key] = q.dims;
    let value = v.width();
    let all = [q, k, v, d_o, d_q, d_k, d_v];
    let on_tiles = has_tiles_back(&all);
    assert!(on_tiles || !attention.silu, "SiLU rides in lightning.cu alone");
    let mut work = Work::near(&d_o.buffer);
    // Walks 0 dv, 1 dk, 2 dq; dv has states [V, K], the others [K, V].
    let launches: &[(usize, usize)] = if key == value { &[(0, 3)] } else { &[(0, 1), (1, 2)] };
    for &(first, walks) in launches {
        let (x, out) = if first == 0 { (key, d_v) } else { (value, d_q) };
        let states = [
            states.before.map_or_else(cuda::absent, cuda::read),
            states.d_after.map_or_else(cuda::absent, cuda::read),
            states.d_before.map_or_else(cuda::absent, cuda::write),
        ];
        let positions = attention.positions.map_or_else(cuda::absent, cuda::read);
        let head = [cuda::read(attention.decay), positions];
        let widths = [key, value].map(|n| cuda::i32(n as i32));
        let last = [first, walks].map(|n| cuda::i32(n as i32));
        if on_tiles {
            let plan = Plan::new(out, x, out.width(), walks);
            let segments = plan.segments_buffer(d_o);
            let read = all[..4].iter().map(|t| cuda::tiles(&t.buffer, t.tiles()));
            let written = all[4..].iter().map(|t| cuda::tiles_out(&t.buffer, t.tiles()));
            let mut arguments: Vec<Argument<'_>> = read.chain(written).collect();
            arguments.extend(head);
            arguments.push(segments.as_ref().map_or_else(cuda::absent, cuda::update));
            arguments.extend(states.into_iter().chain(widths));
            arguments.extend(plan.numbers(tokens, heads));
            arguments.extend(last);
            plan.launch(&mut work, "lightning_backward", attention, &arguments);
        } else {
            let plan = AnyPlan::new(out, x, out.width(), walks);
            let read = all[..4].iter().map(|t| cuda::strided(&t.buffer, t.tiles()));
            let written = all[4..].iter().map(|t| cuda::strided_out(&t.buffer, t.tiles()));
            let mut arguments: Vec<Argument<'_>> = read.chain(written).collect();
            arguments.extend(head.into_iter().chain(states).chain(widths));
            arguments.extend([tokens, heads, plan.groups].map(|n| cuda::i32(n as i32)));
            arguments.extend(last);
            work.launch(&plan.kernel("lightning_any_backward"), plan.grid, &arguments);
        }
    }
    work.submit();
}

/// Whether a backward of these goes to `lightning.cu`: queries and keys first, their width that of states, then values.
fn has_tiles_back(all: &[&Heads]) -> bool {
    all[0].dims[2] >= SHORTEST && all.iter().all(|tensor| plan_width(tensor.width()) && tensor.has_tiles())
}

/// Features of LRPE as `lrpe.cu` makes them, in bf16: the rounded ones and what they lack.
#[derive(Clone, Copy, Debug)]
pub struct Rotated<'a> {
    /// q̂ and k̂: `[B, H, T, 2K]`.
    pub features: [&'a Heads; 2],
    /// The same of what rounding left.
    pub rests: [&'a Heads; 2],
    /// Position of every token in its document: `[B · T]`.
    pub positions: &'a CubeTensor,
}

/// [`backward`] of features of LRPE. Gives the sums that make the gradient of θ, `[rows, H · K]` in float64:
/// it is the sum over the rows. They are taken before dq̂ and dk̂ are rounded, and queries and keys round alike what
/// would be multiplied with positions otherwise (`lightning.cu` says why). With a state that comes from other tokens, or goes to
/// them, it is the sum over these as well; then rows but the last of a document's have whole chunks of [`CHUNK`] tokens.
///
/// # Panics
/// As [`backward`], and for rows of fewer than 64 tokens, heads of more than 128 channels and other types than bf16.
pub fn backward_rotated(
    attention: &Attention<'_>,
    rotated: Rotated<'_>,
    v: &Heads,
    d_o: &Heads,
    [d_q, d_k, d_v]: [&Heads; 3],
    states: States<'_>,
) -> CubeTensor {
    let [q, k] = rotated.features;
    check(d_q, d_k, d_v, d_o);
    assert!(has_tiles_back(&[d_q, d_k, d_v]), "no gradients of features of LRPE: {:?}", d_q.dims);
    let [_, heads, tokens, key] = q.dims;
    let value = v.width();
    let mut work = Work::near(&d_o.buffer);

    let plan = Plan::new(d_v, key, value, 1);
    let segments = plan.segments_buffer(d_o);
    let mut arguments: Vec<Argument<'_>> = [q, k, v, d_o].map(|t| cuda::tiles(&t.buffer, t.tiles())).into();
    arguments.extend([d_q, d_k, d_v].map(|t| cuda::tiles_out(&t.buffer, t.tiles())));
    arguments.extend([cuda::read(attention.decay), attention.positions.map_or_else(cuda::absent, cuda::read)]);
    arguments.push(segments.as_ref().map_or_else(cuda::absent, cuda::update));
    arguments.extend([cuda::absent(), states.d_after.map_or_else(cuda::absent, cuda::read), cuda::absent()]);
    arguments.extend([key, value].map(|n| cuda::i32(n as i32)));
    arguments.extend(plan.numbers(tokens, heads));
    arguments.extend([0, 1].map(cuda::i32));
    plan.launch(&mut work, "lightning_backward", attention, &arguments);

    let has_states = states.before.is_some() || states.d_after.is_some() || states.d_before.is_some();
    let between = has_states.then_some(Between { states, after: None, walks: 0..2 });
    let sums = walk_rotated(&mut work, attention, rotated, v, d_o, [d_q, d_k], between);
    work.submit();
    sums
}

/// The state after the last token of features of LRPE and what they lack, as exact as [`backward_rotated`] needs the state that it
/// begins with: to less than what θ's gradient loses by rounding elsewhere. `scratch` is of the shape of the queries, and holds
/// nothing of use after it.
///
/// # Panics
/// As [`backward_rotated`].
pub fn state_rotated(
    attention: &Attention<'_>,
    rotated: Rotated<'_>,
    v: &Heads,
    scratch: &Heads,
    before: Option<&CubeTensor>,
    after: &CubeTensor,
) {
    let states = States { before, ..States::default() };
    let between = Between { states, after: Some(after), walks: 1..2 };
    let mut work = Work::near(&v.buffer);
    // The walk over the keys and values that makes dq̂ of what is no gradient: its state is what is wanted.
    let sums = walk_rotated(&mut work, attention, rotated, v, v, [scratch, scratch], Some(between));
    work.submit();
    drop(sums);
}

/// The states of the walks for dk̂ (0) and dq̂ (1), and which of the two are taken.
struct Between<'a> {
    states: States<'a>,
    after: Option<&'a CubeTensor>,
    walks: Range<usize>,
}

/// Adds the walks for dk̂ and dq̂, and gives the sums for θ of them.
fn walk_rotated(
    work: &mut Work,
    attention: &Attention<'_>,
    rotated: Rotated<'_>,
    v: &Heads,
    d_o: &Heads,
    [d_q, d_k]: [&Heads; 2],
    between: Option<Between<'_>>,
) -> CubeTensor {
    let ([q, k], [q_rest, k_rest]) = (rotated.features, rotated.rests);
    check(q, k, v, d_o);
    check(q_rest, k_rest, v, d_o);
    let [rows, heads, tokens, key] = q.dims;
    let value = v.width();
    let read = [q, k, v, q_rest, k_rest, d_o];
    let tiled = has_tiles_back(&read) && d_q.has_tiles() && d_k.has_tiles() && q.buffer.dtype == DType::BF16;
    assert!(
        tiled && key.is_multiple_of(16) && !attention.silu,
        "no features of LRPE: {:?} {:?}",
        q.dims,
        q.buffer.dtype
    );
    let walks = between.as_ref().map_or(0..2, |between| between.walks.clone());
    let plan = Plan { theta: true, states: between.is_some(), ..Plan::new(d_q, value, key, walks.len()) };
    let segments = plan.segments_buffer(d_o);
    let sums = cuda::empty(&d_o.buffer, [walks.len() * plan.segment[1] * rows, heads * key / 2], DType::F64);
    let mut arguments: Vec<Argument<'_>> = read.map(|t| cuda::tiles(&t.buffer, t.tiles())).into();
    arguments.extend([d_q, d_k].map(|t| cuda::tiles_out(&t.buffer, t.tiles())));
    arguments.extend([cuda::read(attention.decay), cuda::read(rotated.positions)]);
    arguments.push(segments.as_ref().map_or_else(cuda::absent, cuda::update));
    arguments.push(cuda::write(&sums));
    let last = match &between {
        None => None,
        Some(Between { states, after, walks }) => {
            arguments.extend([
                states.before.map_or_else(cuda::absent, cuda::read),
                after.map_or_else(cuda::absent, cuda::write),
                states.d_after.map_or_else(cuda::absent, cuda::read),
                states.d_before.map_or_else(cuda::absent, cuda::write),
            ]);
            Some([walks.start, walks.len()].map(|n| cuda::i32(n as i32)))
        }
    };
    arguments.extend([key, value].map(|n| cuda::i32(n as i32)));
    arguments.extend(plan.numbers(tokens, heads));
    let entry = if last.is_some() { "lightning_backward_theta_states" } else { "lightning_backward_theta" };
    arguments.extend(last.into_iter().flatten());
    plan.launch(work, entry, attention, &arguments);
    sums
}

#[track_caller]
fn check(q: &Heads, k: &Heads, v: &Heads, o: &Heads) {
    assert!(q.dims == k.dims && v.dims == o.dims, "{:?} {:?} {:?} {:?}", q.dims, k.dims, v.dims, o.dims);
    assert!(q.dims[..3] == v.dims[..3], "{:?} {:?}", q.dims, v.dims);
    let same = |tensor: &&Heads| tensor.buffer.dtype == q.buffer.dtype;
    assert!([k, v, o].iter().all(same), "tensors of one attention are of one type");
}

/// How `lightning.cu` is specialised and cut into blocks for one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Tiles side by side in x and y.
    x_tiles: usize,
    /// Groups of 128 threads, each with 64 columns of z, in a block.
    groups: usize,
    /// Blocks side by side over the columns of z.
    z_groups: usize,
    /// Blocks of one segment: rows × heads × columns × walks.
    blocks: usize,
    /// Chunks of a segment, and segments.
    segment: [usize; 2],
    hopper: bool,
    /// Values are float16, not bf16.
    half: bool,
    /// The sums for θ are taken, from features in two parts.
    theta: bool,
    /// The same between states.
    states: bool,
}

impl Plan {
    /// For x and y of width `x`, z of width `z`, rows, heads and tokens of `out`.
    fn new(out: &Heads, x: usize, z: usize, walks: usize) -> Self {
        let facts = cuda::facts_of(&out.buffer);
        let [rows, heads, tokens, _] = out.dims;
        let half = out.buffer.dtype == DType::F16;
        let sizes = [rows * heads, tokens.div_ceil(TILE), x, z];
        Self { half, ..Self::of(sizes, walks, facts.multiprocessors as usize, facts.is_hopper()) }
    }

    fn of([sequences, chunks, x, z]: [usize; 4], walks: usize, processors: usize, hopper: bool) -> Self {
        let (x_tiles, slices) = (x.div_ceil(TILE), z.div_ceil(TILE));
        // Two groups share the tiles of x and y; a state of more than 128 rows leaves registers for one.
        let groups = if hopper && slices.is_multiple_of(2) && x_tiles <= 2 { 2 } else { 1 };
        let z_groups = slices.div_ceil(groups);
        let blocks = sequences * z_groups * walks;
        // A sequence is cut where blocks are too few for the processors. In chunks of time: the waves
        // of blocks, those of the pass over the segments' own states (a third of the work), its
        // launch, and reading the states of the segments before.
        let cost = |segments: usize| {
            let (waves, length) = ((blocks * segments).div_ceil(processors), chunks.div_ceil(segments));
            let states = (blocks * (segments - 1)).div_ceil(processors);
            let more = if segments > 1 { 6 * 20 + waves * (segments - 1) * 10 } else { 0 };
            20 * waves * length + 7 * states * length + more
        };
        // Their scratch stays below a tenth of the tensors: of q, k, v, o, or for all three walks back of
        // q, k, v, do, dq, dk, dv; 2 bytes a value there, 4 in the states.
        let tensors = if walks == 1 { 2.0 } else { 3.5 / walks as f64 };
        let room = tensors * ((x + z) * chunks * TILE * 2) as f64 / 10.0;
        let most = (room / (x_tiles * TILE * slices * TILE * 4) as f64) as usize;
        let segments =
            (1..=chunks.min(64).min(most.max(1))).min_by_key(|&segments| (cost(segments), segments)).unwrap_or(1);
        let length = chunks.div_ceil(segments).max(1);
        let segment = [length, chunks.div_ceil(length).max(1)];
        Self { x_tiles, groups, z_groups, blocks, segment, hopper, half: false, theta: false, states: false }
    }

    fn is_cut(&self) -> bool {
        self.segment[1] > 1
    }

    /// Scratch for the states of the segments.
    fn segments_buffer(&self, near: &Heads) -> Option<CubeTensor> {
        let state = self.x_tiles * TILE * TILE;
        let values = self.blocks * self.segment[1] * self.groups * state;
        self.is_cut().then(|| cuda::empty(&near.buffer, [values], DType::F32))
    }

    fn numbers(&self, tokens: usize, heads: usize) -> [Argument<'static>; 5] {
        [tokens, heads, self.z_groups, self.segment[0], self.segment[1]].map(|n| cuda::i32(n as i32))
    }

    /// Stages of tiles in shared memory, and all bytes of it.
    fn shared(&self, states_only: bool) -> (usize, usize) {
        let inputs = if states_only { self.x_tiles } else { 2 * self.x_tiles };
        let parts = if self.theta { 2 } else { 1 };
        let stage = (inputs + self.groups * parts) * BOX;
        let table = if self.half { 192 } else { 128 };
        // What the tokens of at most four stages weigh in the gradient of θ.
        let weights = if self.theta { 4 * 4 * TILE } else { 0 };
        let fixed = self.groups * (1 + parts) * BOX + 4 * (128 + self.groups * table) + weights;
        let stages = match (self.hopper, states_only) {
            (true, false) => ((227 * 1024 - fixed - 256) / stage).clamp(1, 4),
            (true, true) => ((100 * 1024) / stage).clamp(2, 6),
            // As much as the smallest of the older GPUs allow.
            (false, _) => ((99 * 1024 - fixed - 256) / stage).clamp(1, 2),
        };
        (stages, stages * stage + fixed + 8 * (4 * stages + self.groups))
    }

    fn kernel(&self, entry: &'static str, attention: &Attention<'_>, states_only: bool) -> (Kernel, Grid) {
        let (stages, shared) = self.shared(states_only);
        let kernel = Kernel::new(&SOURCE, entry)
            .define("HOPPER", self.hopper)
            .define("XB", self.x_tiles as i64)
            .define("NW", self.groups as i64)
            .define("STAGES", stages as i64)
            .define("HALF", self.half)
            .define("DOCS", attention.positions.is_some())
            .define("SILU", attention.silu)
            .define("THETA", self.theta)
            .define("STATE_ONLY", states_only);
        let kernel = if self.states { kernel.define("STATES", true) } else { kernel };
        let grid = Grid::new(self.blocks as u32, (self.groups * 128 + 128) as u32)
            .blocks([self.blocks as u32, self.segment[1] as u32, 1])
            .shared(shared as u32);
        (kernel, grid)
    }

    fn launch(&self, work: &mut Work, entry: &'static str, attention: &Attention<'_>, arguments: &[Argument<'_>]) {
        let passes: &[bool] = if self.is_cut() { &[true, false] } else { &[false] };
        for &states_only in passes {
            let (kernel, grid) = self.kernel(entry, attention, states_only);
            work.launch(&kernel, grid, arguments);
        }
    }
}

/// The same for `lightning_any.cu`.
struct AnyPlan {
    element: i64,
    x: usize,
    groups: usize,
    grid: Grid,
}

impl AnyPlan {
    fn new(out: &Heads, x: usize, z: usize, walks: usize) -> Self {
        let element = match out.buffer.dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
            other => panic!("attention of {other:?}"),
        };
        let shared = Self::shared(x);
        if let Err(error) = fits(x, cuda::facts_of(&out.buffer).shared_per_block as usize) {
            panic!("{error}");
        }
        let (x, groups) = (x.next_multiple_of(4), z.div_ceil(ANY_COLUMNS));
        let [rows, heads, ..] = out.dims;
        let grid = Grid::new((rows * heads * groups * walks) as u32, 256).shared(shared as u32);
        Self { element, x, groups, grid }
    }

    /// Bytes of shared memory of a block for x and y of this width.
    fn shared(x: usize) -> usize {
        let x = x.next_multiple_of(4);
        let chunk = if x > 128 { 16 } else { 32 };
        4 * (x * ANY_COLUMNS + 2 * chunk * (x + 4) + chunk * ANY_COLUMNS + chunk * (chunk + 1) + 3 * chunk)
    }

    fn kernel(&self, entry: &'static str) -> Kernel {
        Kernel::new(&ANY, entry).define("TYPE", self.element).define("X", self.x as i64)
    }
}

#[cfg(test)]
#[path = "lightning_tests.rs"]
mod tests;
