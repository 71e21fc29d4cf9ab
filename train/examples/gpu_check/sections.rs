//! One function for every operation: checks first, then the table.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use train::config::Moments;
use train::cuda::{self, Grid, Kernel, Product, Source, Work};
use train::ops::adamw::{FlatAdamW, Settings, zero_moments};
use train::ops::cross_entropy::{IGNORE, cross_entropy};
use train::ops::embedding::embedding;
use train::ops::weight::{GradientSum, Weight};
use train::ops::{gate, kernels, linear, sglu, srms_norm};

use crate::measure::{Bench, Numbers, host, host64};

type Section = fn(&mut Bench);

pub const ALL: [(&str, Section); 9] = [
    ("ceilings", ceilings),
    ("door", door),
    ("linear", linears),
    ("embedding", embeddings),
    ("norm", norms),
    ("sglu", sglus),
    ("gate", gates),
    ("cross_entropy", cross_entropies),
    ("adamw", adamws),
];

const BF16: DType = DType::BF16;
const F32: DType = DType::F32;
/// Tolerance of one rounding to bf16.
const ROUNDING: f64 = 2.5e-3;

fn ceilings(bench: &mut Bench) {
    let bytes = 1 << 30;
    let (from, to) = (bench.normal([bytes / 4], F32, 1.0), bench.normal([bytes / 4], F32, 1.0));
    let seconds = bench.seconds(|| {
        let mut work = Work::near(&from);
        work.copy(&from, &to);
        work.submit();
    });
    bench.bandwidth = 2.0 * bytes as f64 / seconds;
    println!("copy of 1 GiB: {:.3} ms, {:.0} GB/s read and written", 1e3 * seconds, bench.bandwidth / 1e9);
    let n = 8192;
    let (a, b) = (bench.normal([n, n], BF16, 1.0), bench.normal([n, n], BF16, 1.0));
    let out = cuda::empty(&a, [n, n], BF16);
    let operations = 2.0 * (n as f64).powi(3);
    let seconds = bench.seconds(|| {
        let mut work = Work::near(&a);
        work.product(&Product::new(&a, &b, &out));
        work.submit();
    });
    bench.operations = operations / seconds;
    println!("product of 8192 matrices: {:.3} ms, {:.0} TFLOP/s", 1e3 * seconds, bench.operations / 1e12);
    let begin = Instant::now();
    cuda::warm_up(&a.device, kernels()).unwrap();
    println!("compiling or reading one kernel of every source: {:.2} s", begin.elapsed().as_secs_f64());
}

static PROBE: Source = Source {
    name: "probe.cu",
    text: r#"
extern "C" __global__ void fill(float* x, unsigned int n, float value, int add, long long far, unsigned long long wide) {
  unsigned int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < n) x[at] = value + add + (float)(far / 4294967296ll) + (float)(wide >> 40);
}
extern "C" __global__ void bump(float* x, unsigned int n) {
  unsigned int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < n) x[at] += STEP;
}
extern "C" __global__ void staged(const float* x, float* y, unsigned int words) {
  extern __shared__ float s[];
  for (unsigned int i = threadIdx.x; i < words; i += blockDim.x) s[i] = x[blockIdx.x * (unsigned long long)words + i];
  __syncthreads();
  for (unsigned int i = threadIdx.x; i < words; i += blockDim.x) y[blockIdx.x * (unsigned long long)words + i] = s[words - 1 - i];
}
"#,
};

fn probe(entry: &'static str) -> Kernel {
    Kernel::new(&PROBE, entry).define("STEP", 1)
}

fn door(bench: &mut Bench) {
    // Every type of argument, an offset, and what lies around untouched.
    let flat = bench.place(vec![1.0; 96], [96], F32);
    let part = cuda::flat_view(&flat, 32, [16]);
    let mut work = Work::near(&flat);
    let arguments =
        [cuda::write(&part), cuda::u32(16), cuda::f32(0.5), cuda::i32(-3), cuda::i64(-5 << 32), cuda::u64(7 << 40)];
    work.launch(&probe("fill"), Grid::new(1, 32), &arguments);
    work.launch(&probe("bump"), Grid::new(1, 32), &[cuda::update(&part), cuda::u32(8)]);
    work.submit();
    let want: Vec<f32> = (0..96)
        .map(|at| match at {
            32..40 => 0.5,
            40..48 => -0.5,
            _ => 1.0,
        })
        .collect();
    bench.that("arguments of every type reach a view at an offset, in order", host(&flat) == want);

    let words = 48_000;
    let x = bench.normal([4 * words], F32, 1.0);
    let y = cuda::empty(&x, [4 * words], F32);
    let mut work = Work::near(&x);
    let grid = Grid::new(4, 512).shared(4 * words as u32);
    work.launch(&probe("staged"), grid, &[cuda::read(&x), cuda::write(&y), cuda::u32(words as u32)]);
    work.submit();
    let reversed: Vec<f32> = host(&x).chunks(words).flat_map(|part| part.iter().rev().copied()).collect();
    bench.that("187 KiB of shared memory a block", host(&y) == reversed);

    let wrong = |arguments: &[cuda::Argument<'_>]| {
        let mut work = Work::near(&flat);
        let add = AssertUnwindSafe(|| work.launch(&probe("bump"), Grid::new(1, 32), arguments));
        catch_unwind(add).is_err()
    };
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let half = bench.normal([8], BF16, 1.0);
    let refused = [
        wrong(&[cuda::update(&flat)]),
        wrong(&[cuda::update(&flat), cuda::i32(8)]),
        wrong(&[cuda::u32(8), cuda::update(&flat)]),
        wrong(&[cuda::update(&half), cuda::u32(8)]),
        wrong(&[cuda::read(&flat), cuda::u32(8)]),
    ];
    std::panic::set_hook(hook);
    bench.that(&format!("wrong arguments are refused: {refused:?}"), refused == [true; 5]);

    // A launch that the driver refuses: what it was to write cannot be read, nor what follows.
    println!("   two failures follow in the log");
    let lost = bench.place(vec![1.0; 32], [32], F32);
    let next = cuda::empty(&lost, [32], F32);
    let mut work = Work::near(&lost);
    work.launch(&probe("bump"), Grid::new(1, 4096), &[cuda::update(&lost), cuda::u32(32)]);
    work.submit();
    let mut work = Work::near(&lost);
    work.copy(&lost, &next);
    work.submit();
    bench.that("a failed launch makes its output an error", cuda::download(&lost).is_err());
    bench.that("and what is computed from it", cuda::download(&next).is_err());
    bench.that("and nothing else", cuda::download(&flat).is_ok());

    let small = bench.normal([256], F32, 1.0);
    let one = bench.seconds(|| {
        let mut work = Work::near(&small);
        work.launch(&probe("bump"), Grid::new(1, 256), &[cuda::update(&small), cuda::u32(256)]);
        work.submit();
    });
    let many = bench.seconds(|| {
        let mut work = Work::near(&small);
        for _ in 0..100 {
            work.launch(&probe("bump"), Grid::new(1, 256), &[cuda::update(&small), cuda::u32(256)]);
        }
        work.submit();
    });
    println!("a launch: {:.2} us alone, {:.2} us of a hundred together", 1e6 * one, 1e4 * many);
}

/// Element (i, j) of op(a)·op(b) in float64.
fn entry(a: &[f64], b: &[f64], [m, n, k]: [usize; 3], transposed: [bool; 2], i: usize, j: usize) -> f64 {
    let at = |l: usize| if transposed[0] { a[l * m + i] } else { a[i * k + l] };
    let bt = |l: usize| if transposed[1] { b[j * k + l] } else { b[l * n + j] };
    (0..k).map(|l| at(l) * bt(l)).sum()
}

fn form<'a>(a: &'a CubeTensor, b: &'a CubeTensor, out: &'a CubeTensor, transposed: [bool; 2]) -> Product<'a> {
    let product = Product::new(a, b, out);
    let product = if transposed[0] { product.transpose_a() } else { product };
    if transposed[1] { product.transpose_b() } else { product }
}

fn linears(bench: &mut Bench) {
    // All forms, sizes that fill no tile, rows that are apart, offsets of 16 bytes.
    for [m, n, k] in [[256, 128, 64], [72, 40, 200], [8, 1000, 136]] {
        for transposed in [[false, false], [false, true], [true, false], [true, true]] {
            let stored = |transposed: bool, [r, c]: [usize; 2]| if transposed { [c, r] } else { [r, c] };
            let wide = |[r, c]: [usize; 2]| {
                let whole = bench.normal([r, c + 24], BF16, 1.0);
                cuda::columns(&whole, 8, c)
            };
            let (a, b) = (wide(stored(transposed[0], [m, k])), wide(stored(transposed[1], [k, n])));
            let (ha, hb) = (host64(&a), host64(&b));
            let want: Vec<f64> = (0..m * n).map(|at| entry(&ha, &hb, [m, n, k], transposed, at / n, at % n)).collect();
            for dtype in [BF16, F32] {
                bench.poison(m * n, dtype);
                let out = cuda::empty(&a, [m, n], dtype);
                let added = bench.normal([m, n], dtype, 1.0);
                let with = cuda::empty(&a, [m, n], dtype);
                let mut work = Work::near(&a);
                work.product(&form(&a, &b, &out, transposed));
                work.product(&form(&a, &b, &with, transposed).times(0.5).plus(&added));
                if dtype == F32 {
                    work.product(&form(&a, &b, &out, transposed).accumulate(true));
                }
                work.submit();
                let times = if dtype == F32 { 2.0 } else { 1.0 };
                let sum: Vec<f64> = want.iter().map(|w| w * times).collect();
                let tolerance = if dtype == F32 { 1e-5 } else { ROUNDING };
                let name = format!("{m}x{n}x{k} transposed {transposed:?} {dtype:?}");
                bench.close(&name, &host(&out), &sum, tolerance);
                let plus: Vec<f64> = host64(&added).iter().zip(&want).map(|(c, w)| c + 0.5 * w).collect();
                bench.close(&format!("{name}, half and added"), &host(&with), &plus, tolerance);
            }
        }
    }
    let tokens = 32768;
    for (name, width, out) in [("qkvu", 1024, 4096), ("out", 1024, 1024), ("l1 l2", 1024, 5632), ("l3", 2816, 1024)] {
        let (x, w) = (bench.normal([tokens, width], BF16, 1.0), bench.normal([out, width], BF16, 0.02));
        let dy = bench.normal([tokens, out], BF16, 1.0);
        let residual = bench.normal([tokens, out], BF16, 1.0);
        let sum = GradientSum::new(bench.normal([out, width], F32, 1.0));
        linear::backward_weight(&dy, &x, Some(&sum));
        let operations = 2.0 * (tokens * width * out) as f64;
        bench.operations(&format!("{name} forward"), operations, || drop(linear::forward(&x, &w, None)));
        bench.operations(&format!("{name} forward + residual"), operations, || {
            drop(linear::forward(&x, &w, Some(&residual)));
        });
        bench.operations(&format!("{name} backward, input"), operations, || drop(linear::backward_input(&dy, &w)));
        bench.operations(&format!("{name} backward, weight added in f32"), operations, || {
            linear::backward_weight(&dy, &x, Some(&sum));
        });
    }
}

fn embeddings(bench: &mut Bench) {
    let (vocabulary, width, tokens) = (64_000, 1024, 32_768);
    let table = bench.normal([vocabulary, width], BF16, 1.0);
    let factor = bench.normal([tokens, width], BF16, 1.0);
    let dy = host64(&factor);
    for (name, zipf) in [("uniform", false), ("Zipf-like", true)] {
        let mut numbers = Numbers(3);
        let ids: Vec<u32> = (0..tokens)
            .map(|_| match zipf {
                true => (vocabulary as f64).powf(numbers.unit()) as u32 - 1,
                false => numbers.below(vocabulary as u32),
            })
            .collect();
        let x = cuda::of(embedding(cuda::to_tensor::<2>(table.clone()), &ids, 32.0));
        let rows = host64(&table);
        let want: Vec<f64> =
            ids.iter().flat_map(|&id| rows[id as usize * width..][..width].iter().map(|v| 32.0 * v)).collect();
        bench.close(&format!("{name} ids, forward"), &host(&x), &want, ROUNDING);

        let mut sums = vec![0f64; vocabulary * width];
        for (token, &id) in ids.iter().enumerate() {
            let to = &mut sums[id as usize * width..][..width];
            to.iter_mut().zip(&dy[token * width..][..width]).for_each(|(to, v)| *to += 32.0 * v);
        }
        let operation = train::ops::embedding::Backward::new(&ids, vocabulary, 32.0);
        bench.poison(vocabulary * width, F32);
        let dw = cuda::empty(&table, [vocabulary, width], F32);
        operation.add(&factor, &dw, false);
        let first = host(&dw);
        bench.close(&format!("{name} ids, backward"), &first, &sums, 1e-6);
        operation.add(&factor, &dw, false);
        bench.that("the same bits again", host(&dw) == first);
        operation.add(&factor, &dw, true);
        sums.iter_mut().for_each(|v| *v *= 2.0);
        bench.close(&format!("{name} ids, backward added"), &host(&dw), &sums, 1e-6);

        let mut distinct = ids.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let moved = (tokens * width * 2) as f64;
        let table_tensor = cuda::to_tensor::<2>(table.clone());
        bench.bytes(&format!("{name} ids, forward with upload"), 2.0 * moved, || {
            drop(embedding(table_tensor.clone(), &ids, 32.0));
        });
        let rows = (distinct.len() * width * 4) as f64;
        bench.bytes(&format!("{name} ids, backward into zeros"), moved + (vocabulary * width * 4) as f64, || {
            operation.add(&factor, &dw, false);
        });
        bench.bytes(&format!("{name} ids, backward added"), moved + 2.0 * rows, || {
            operation.add(&factor, &dw, true);
        });
        let begin = Instant::now();
        for _ in 0..20 {
            std::hint::black_box(train::ops::embedding::Backward::new(&ids, vocabulary, 32.0));
        }
        println!(
            "{name} ids: {} distinct; sorting on the host {:.3} ms",
            distinct.len(),
            50.0 * begin.elapsed().as_secs_f64()
        );
    }
}

/// y and, with a gradient of y, dx of rows in float64.
fn norm64(x: &[f64], dy: Option<&[f64]>, width: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for (row, x) in x.chunks(width).enumerate() {
        let root = (x.iter().map(|v| v * v).sum::<f64>() / width as f64).sqrt();
        let scale = 1.0 / (root + 1e-8);
        match dy {
            None => out.extend(x.iter().map(|v| v * scale)),
            Some(dy) => {
                let dy = &dy[row * width..][..width];
                let dot: f64 = x.iter().zip(dy).map(|(x, g)| x * g).sum();
                let factor = dot * scale * scale / (root * width as f64);
                out.extend(x.iter().zip(dy).map(|(x, g)| g * scale - x * factor));
            }
        }
    }
    out
}

fn norms(bench: &mut Bench) {
    for [rows, width] in [[1, 8], [7, 264], [70, 1024], [33, 1032], [70, 2560], [9, 4096], [9, 8192], [5, 12_288]] {
        let name = format!("{rows}x{width}");
        let x = bench.normal([rows, width], BF16, 3.0);
        let dy = bench.normal([rows, width], BF16, 1.0);
        let other = bench.normal([rows, width], BF16, 1.0);
        let (hx, hdy, hother) = (host64(&x), host64(&dy), host64(&other));
        bench.poison(rows * width, BF16);
        bench.close(
            &format!("{name} forward"),
            &host(&srms_norm::forward_on_cuda(&x)),
            &norm64(&hx, None, width),
            ROUNDING,
        );
        let dx = srms_norm::backward_on_cuda(&x, &dy, None, None);
        let want = norm64(&hx, Some(&hdy), width);
        bench.close(&format!("{name} backward"), &host(&dx), &want, ROUNDING);
        let again = cuda::empty_like(&x);
        let dx = srms_norm::backward_on_cuda(&x, &dy, Some(&other), Some(&again));
        bench.close(&format!("{name} forward again"), &host(&again), &norm64(&hx, None, width), ROUNDING);
        let want: Vec<f64> = want.iter().zip(&hother).map(|(a, b)| a + b).collect();
        bench.close(&format!("{name} backward + residual"), &host(&dx), &want, ROUNDING);
        let [sum, y] = srms_norm::add_forward_on_cuda(&x, &other);
        let want: Vec<f64> = hx.iter().zip(&hother).map(|(a, b)| a + b).collect();
        bench.close(&format!("{name} sum"), &host(&sum), &want, ROUNDING);
        bench.close(&format!("{name} norm of the sum"), &host(&y), &norm64(&want, None, width), 2.0 * ROUNDING);
    }
    let zeros = bench.place(vec![0.0; 64], [8, 8], BF16);
    let ones = bench.place(vec![1.0; 64], [8, 8], BF16);
    let dx = srms_norm::backward_on_cuda(&zeros, &ones, None, None);
    let finite = |t: &CubeTensor| host(t).iter().all(|v| v.is_finite());
    bench.that("zeros stay finite", finite(&srms_norm::forward_on_cuda(&zeros)) && finite(&dx));
    for [rows, width] in [[32_768, 1024], [16_384, 2048], [8192, 4096]] {
        let x = bench.normal([rows, width], BF16, 3.0);
        let dy = bench.normal([rows, width], BF16, 1.0);
        let one = (2 * rows * width) as f64;
        bench.bytes(&format!("{rows}x{width} forward"), 2.0 * one, || drop(srms_norm::forward_on_cuda(&x)));
        bench.bytes(&format!("{rows}x{width} add and forward"), 4.0 * one, || {
            drop(srms_norm::add_forward_on_cuda(&x, &dy));
        });
        bench.bytes(&format!("{rows}x{width} backward"), 3.0 * one, || {
            drop(srms_norm::backward_on_cuda(&x, &dy, None, None));
        });
        let y = cuda::empty_like(&x);
        bench.bytes(&format!("{rows}x{width} backward + residual, forward again"), 5.0 * one, || {
            drop(srms_norm::backward_on_cuda(&x, &dy, Some(&x), Some(&y)));
        });
    }
}

fn sglus(bench: &mut Bench) {
    for [rows, half] in [[1, 8], [5, 40], [300, 2816]] {
        let ab = bench.normal([rows, 2 * half], BF16, 1.0);
        let dy = bench.normal([rows, half], BF16, 1.0);
        let (hab, hdy) = (host64(&ab), host64(&dy));
        let at = |row: usize, j: usize| hab[row * 2 * half + j];
        let want: Vec<f64> = (0..rows * half).map(|i| at(i / half, i % half) * at(i / half, half + i % half)).collect();
        bench.poison(2 * rows * half, BF16);
        let again = cuda::empty_like(&dy);
        bench.close(&format!("{rows}x{half} forward"), &host(&sglu::forward(&ab)), &want, ROUNDING);
        let want: Vec<f64> = (0..2 * rows * half)
            .map(|i| {
                let (row, j) = (i / (2 * half), i % (2 * half));
                hdy[row * half + j % half] * at(row, (j + half) % (2 * half))
            })
            .collect();
        bench.close(
            &format!("{rows}x{half} backward"),
            &host(&sglu::backward(&ab, &dy, Some(&again))),
            &want,
            ROUNDING,
        );
        bench.close(&format!("{rows}x{half} forward again"), &host(&again), &host64(&sglu::forward(&ab)), 0.0);
    }
    let [rows, half] = [32_768, 2816];
    let ab = bench.normal([rows, 2 * half], BF16, 1.0);
    let dy = bench.normal([rows, half], BF16, 1.0);
    let one = (2 * rows * half) as f64;
    bench.bytes(&format!("{rows}x{half} forward"), 3.0 * one, || drop(sglu::forward(&ab)));
    let y = cuda::empty_like(&dy);
    bench.bytes(&format!("{rows}x{half} backward, forward again"), 6.0 * one, || {
        drop(sglu::backward(&ab, &dy, Some(&y)));
    });
}

fn gates(bench: &mut Bench) {
    for [rows, width] in [[1, 8], [70, 1024], [33, 1032], [9, 4096]] {
        let wide = bench.normal([rows, 4 * width], BF16, 1.0);
        let u = cuda::columns(&wide, 3 * width, width);
        let (o, dy) = (bench.normal([rows, width], BF16, 3.0), bench.normal([rows, width], BF16, 1.0));
        let (hu, ho, hdy) = (host64(&u), host64(&o), host64(&dy));
        let normed = norm64(&ho, None, width);
        let times = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a * b).collect() };
        bench.poison(rows * width, BF16);
        bench.close(&format!("{rows}x{width} forward"), &host(&gate::forward(&u, &o)), &times(&hu, &normed), ROUNDING);
        let d_wide = bench.normal([rows, 4 * width], BF16, 1.0);
        let before = host(&d_wide);
        let du = cuda::columns(&d_wide, 3 * width, width);
        let again = cuda::empty_like(&o);
        let d_o = gate::backward(&u, &o, &dy, &du, Some(&again));
        bench.close(&format!("{rows}x{width} forward again"), &host(&again), &host64(&gate::forward(&u, &o)), 4e-3);
        bench.close(&format!("{rows}x{width} du"), &host(&du), &times(&hdy, &normed), ROUNDING);
        let want = norm64(&ho, Some(&times(&hdy, &hu)), width);
        bench.close(&format!("{rows}x{width} do"), &host(&d_o), &want, ROUNDING);
        let outside = |values: Vec<f32>| -> Vec<f32> {
            values.chunks(4 * width).flat_map(|row| row[..3 * width].to_vec()).collect()
        };
        bench.that("the other columns are untouched", outside(host(&d_wide)) == outside(before));
    }
    let [rows, width] = [32_768, 1024];
    let wide = bench.normal([rows, 4 * width], BF16, 1.0);
    let d_wide = cuda::empty_like(&wide);
    let (u, du) = (cuda::columns(&wide, 3 * width, width), cuda::columns(&d_wide, 3 * width, width));
    let (o, dy) = (bench.normal([rows, width], BF16, 3.0), bench.normal([rows, width], BF16, 1.0));
    let one = (2 * rows * width) as f64;
    bench.bytes(&format!("{rows}x{width} forward"), 3.0 * one, || drop(gate::forward(&u, &o)));
    let y = cuda::empty_like(&o);
    bench.bytes(&format!("{rows}x{width} backward, forward again"), 6.0 * one, || {
        drop(gate::backward(&u, &o, &dy, &du, Some(&y)));
    });
}

/// Loss, and dh and dw of it and the z-loss, in float64.
fn cross_entropy64(h: &[f64], w: &[f64], targets: &[u32], width: usize, z: f64) -> (f64, Vec<f64>, Vec<f64>) {
    let vocabulary = w.len() / width;
    let share = 1.0 / targets.iter().filter(|&&t| t != IGNORE).count() as f64;
    let (mut loss, mut dh, mut dw) = (0.0, vec![0.0; h.len()], vec![0.0; w.len()]);
    for (t, &target) in targets.iter().enumerate().filter(|(_, t)| **t != IGNORE) {
        let h = &h[t * width..][..width];
        let dot = |v: usize| h.iter().zip(&w[v * width..][..width]).map(|(a, b)| a * b).sum::<f64>();
        let logits: Vec<f64> = (0..vocabulary).map(dot).collect();
        let largest = logits.iter().copied().fold(f64::MIN, f64::max);
        let lse = logits.iter().map(|x| (x - largest).exp()).sum::<f64>().ln() + largest;
        loss += share * (lse - logits[target as usize]);
        for (v, x) in logits.iter().enumerate() {
            let mut g = (x - lse).exp() * (1.0 + 2.0 * z * lse);
            g -= f64::from(u8::from(v as u32 == target));
            for c in 0..width {
                dh[t * width + c] += share * g * w[v * width + c];
                dw[v * width + c] += share * g * h[c];
            }
        }
    }
    (loss, dh, dw)
}

fn cross_entropies(bench: &mut Bench) {
    let scalar = |tensor: Tensor<1>| f64::from(tensor.into_data().convert::<f32>().try_into_vec::<f32>().unwrap()[0]);
    for (tokens, width, vocabulary, z, scale) in
        [(9, 16, 300, 0.0, 1.0), (200, 64, 1003, 0.01, 1.0), (64, 128, 8000, 0.0, 0.02), (300, 64, 64_001, 1e-4, 0.1)]
    {
        let h = bench.normal([tokens, width], BF16, 1.0);
        let w = bench.normal([vocabulary, width], BF16, scale);
        let mut numbers = Numbers(5);
        let targets: Vec<u32> =
            (0..tokens).map(|t| if t % 5 == 2 { IGNORE } else { numbers.below(vocabulary as u32) }).collect();
        let (loss, dh, dw) = cross_entropy64(&host64(&h), &host64(&w), &targets, width, z);
        let run = || {
            let hidden = cuda::to_tensor::<2>(h.clone()).autodiff().require_grad();
            let weight = cuda::to_tensor::<2>(w.clone()).autodiff().require_grad();
            let loss = cross_entropy(hidden.clone(), weight.clone(), &targets, z, 1.0) * 2.0;
            let gradients = loss.backward();
            let of = |tensor: Tensor<2>| host(&cuda::of(tensor.grad(&gradients).unwrap()));
            (scalar(loss.inner()), of(hidden), of(weight))
        };
        let name = format!("{tokens}x{width}x{vocabulary}, z {z}");
        bench.poison(tokens * width, BF16);
        let got = run();
        bench.close(&format!("{name} loss"), &[got.0 as f32], &[2.0 * loss], 1e-3);
        let twice = |v: Vec<f64>| -> Vec<f64> { v.iter().map(|v| 2.0 * v).collect() };
        // Logits in bf16: with values of 8 and more the exponentials are off by their rounding.
        let tolerance = if scale == 1.0 { 4e-2 } else { 5e-3 };
        bench.close(&format!("{name} dh"), &got.1, &twice(dh), tolerance);
        bench.close(&format!("{name} dw"), &got.2, &twice(dw), tolerance);
        let again = run();
        bench.that("the same bits again", got == again);
        // Into a sum, from the root of the tape.
        let sum_buffer = cuda::empty(&w, [vocabulary, width], F32);
        let sum = GradientSum::new(sum_buffer.clone());
        let hidden = cuda::to_tensor::<2>(h.clone()).autodiff().require_grad();
        let weight = Weight::with_sum(cuda::to_tensor::<2>(w.clone()).autodiff().require_grad(), sum);
        cross_entropy(hidden.clone(), weight.clone(), &targets, z, 1.0).backward();
        let gradients = cross_entropy(hidden.clone(), weight.clone(), &targets, z, 1.0).backward();
        let halves: Vec<f64> = got.2.iter().map(|v| f64::from(*v)).collect();
        bench.close(&format!("{name} dw summed over two parts"), &host(&sum_buffer), &halves, 1e-5);
        let own = host(&cuda::of(hidden.grad(&gradients).unwrap()));
        let want: Vec<f64> = got.1.iter().map(|v| f64::from(*v) / 2.0).collect();
        bench.close(&format!("{name} dh beside a sum"), &own, &want, ROUNDING);
        let gradients = (cross_entropy(hidden.clone(), weight, &targets, z, 1.0) * 3.0).backward();
        let own = host(&cuda::of(hidden.grad(&gradients).unwrap()));
        bench.that("a scaled loss with a sum gives NaN, not a wrong gradient", own.iter().all(|v| v.is_nan()));
    }
    let (tokens, width, vocabulary) = (32_768, 1024, 64_000);
    let h = bench.normal([tokens, width], BF16, 1.0);
    let w = bench.normal([vocabulary, width], BF16, 0.02);
    let sum = GradientSum::new(cuda::empty(&w, [vocabulary, width], F32));
    let mut numbers = Numbers(9);
    let targets: Vec<u32> = (0..tokens).map(|_| numbers.below(vocabulary as u32)).collect();
    let product = 2.0 * (tokens * width * vocabulary) as f64;
    let weight = || Weight::with_sum(cuda::to_tensor::<2>(w.clone()).autodiff().require_grad(), sum.clone());
    let used = |bench: &Bench| bench.device.memory_pool_usage().map(|usage| usage.bytes_in_use >> 20);
    println!("in use before: {:?} MiB", used(bench));
    let both = bench.operations("32768x1024x64000 loss and gradients", 3.0 * product, || {
        let hidden = cuda::to_tensor::<2>(h.clone()).autodiff().require_grad();
        drop(cross_entropy(hidden, weight(), &targets, 0.0, 1.0).backward());
    });
    bench.operations("32768x1024x64000 loss alone", product, || {
        drop(cross_entropy(cuda::to_tensor::<2>(h.clone()), cuda::to_tensor::<2>(w.clone()), &targets, 0.0, 1.0));
    });
    println!(
        "   of which at least {:.2} ms are two passes over the logits",
        4e3 * (tokens * vocabulary) as f64 / bench.bandwidth
    );
    println!(
        "   reserved: {:?} MiB; {:.2} ms a step",
        bench.device.memory_pool_usage().map(|usage| usage.bytes_reserved >> 20),
        1e3 * both
    );
}

/// Before the first step, moments in float32.
fn adamw(values: CubeTensor, without_decay: &[Range<usize>]) -> FlatAdamW {
    let moments = zero_moments(&values, Moments::Float32);
    FlatAdamW::new(values, moments, without_decay, 0)
}

fn adamws(bench: &mut Bench) {
    for count in [100_003, 4096, 5] {
        let values: Vec<f32> = host(&bench.normal([count], F32, 1.0));
        let kept = [3..(count / 3).max(4), count / 2 + 1..count / 2 + 2];
        let kept = &kept[..if count > 5 { 2 } else { 1 }];
        let state = adamw(bench.place(values.clone(), [count], F32), kept);
        let base = Settings { rate: 0.01, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, clip_norm: 1.0 };
        let mut want: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        let mut moments = vec![[0f64; 2]; count];
        let mut norms_agree = true;
        for (step, rate) in [0.01, 0.02, 0.005, 0.01].into_iter().enumerate() {
            let settings = Settings { rate, clip_norm: if step == 2 { 0.0 } else { 1.0 }, ..base };
            // A step that is no number between the second and the third: nothing may change.
            if step == 2 {
                let mut bad = vec![0.1f32; count];
                bad[count - 1] = f32::NAN;
                let mut work = Work::near(&state.values);
                work.copy(&bench.place(bad, [count], F32), &state.gradient);
                work.submit();
                state.step(&settings);
            }
            let gradient = bench.normal([count], F32, 0.1);
            let mut work = Work::near(&state.values);
            work.copy(&gradient, &state.gradient);
            work.submit();
            state.step(&settings);
            let gradient = host64(&gradient);
            let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            norms_agree &= (f64::from(state.taken().unwrap().norm) / norm - 1.0).abs() < 1e-5;
            let clip = if settings.clip_norm > 0.0 { (settings.clip_norm / norm).min(1.0) } else { 1.0 };
            for (i, g) in gradient.iter().enumerate() {
                let g = g * clip;
                let [m, v] = &mut moments[i];
                *m = base.beta1 * *m + (1.0 - base.beta1) * g;
                *v = base.beta2 * *v + (1.0 - base.beta2) * g * g;
                let t = step as i32 + 1;
                let (m, v) = (*m / (1.0 - base.beta1.powi(t)), *v / (1.0 - base.beta2.powi(t)));
                if !kept.iter().any(|range| range.contains(&i)) {
                    want[i] -= rate * base.weight_decay * want[i];
                }
                want[i] -= rate * m / (v.sqrt() + base.epsilon);
            }
        }
        let taken = state.taken().unwrap();
        bench.that(&format!("{count} values: norms"), norms_agree);
        bench.that(
            &format!("{count} values: {taken:?}"),
            taken.finite && (taken.steps, taken.skipped, taken.skipped_last) == (4, 1, 0),
        );
        bench.close(&format!("{count} values after four steps"), &host(&state.values), &want, 1e-6);
        bench.close(&format!("{count} values, bf16 copy"), &host(&state.working), &want, ROUNDING);
    }
    let count = 464_000_000;
    let state = adamw(bench.normal([count], F32, 0.02), &[1_000_000..1_001_024, 2_000_000..2_001_024]);
    let mut work = Work::near(&state.values);
    work.copy(&bench.normal([count], F32, 0.001), &state.gradient);
    work.submit();
    let settings = Settings { rate: 1e-4, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, clip_norm: 1.0 };
    bench.bytes("464 M values: norm, control, update", 34.0 * count as f64, || state.step(&settings));
    let first = state.taken().unwrap().norm;
    state.step(&settings);
    bench.that("the norm has the same bits again", state.taken().unwrap().norm.to_bits() == first.to_bits());
}
