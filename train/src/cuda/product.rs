//! Matrix products by cuBLASLt: bf16 factors, float32 accumulation, bf16 or float32 results.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::result as cu;
use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::{Error, buffer, libraries, tune};

/// `out = alpha · op(a) · op(b)`, plus what was in `out` or another matrix.
///
/// All are row-major matrices whose rows may be apart; `op` is the transpose where asked for.
#[derive(Clone, Debug)]
pub struct Product<'a> {
    pub(super) a: &'a CubeTensor,
    pub(super) b: &'a CubeTensor,
    pub(super) out: &'a CubeTensor,
    pub(super) added: Option<&'a CubeTensor>,
    transposed: [bool; 2],
    accumulates: bool,
    alpha: f32,
}

impl<'a> Product<'a> {
    /// `out = a · b` for `a: [m, k]`, `b: [k, n]` in bf16 and `out: [m, n]` in bf16 or float32.
    pub fn new(a: &'a CubeTensor, b: &'a CubeTensor, out: &'a CubeTensor) -> Self {
        Self { a, b, out, added: None, transposed: [false; 2], accumulates: false, alpha: 1.0 }
    }

    /// With the transpose of `a: [k, m]`.
    pub fn transpose_a(mut self) -> Self {
        self.transposed[0] = true;
        self
    }

    /// With the transpose of `b: [n, k]`.
    pub fn transpose_b(mut self) -> Self {
        self.transposed[1] = true;
        self
    }

    /// Times `alpha`.
    pub fn times(mut self, alpha: f32) -> Self {
        self.alpha = alpha;
        self
    }

    /// Added to what is in `out`, where `yes`.
    pub fn accumulate(mut self, yes: bool) -> Self {
        self.accumulates = yes;
        self
    }

    /// Plus `added`, of the shape and type of `out`.
    pub fn plus(mut self, added: &'a CubeTensor) -> Self {
        self.added = Some(added);
        self
    }

    pub(super) fn accumulates(&self) -> bool {
        self.accumulates
    }

    /// The problem apart from its addresses.
    #[track_caller]
    pub(super) fn call(&self) -> Call {
        let (a, lda) = buffer::rows(self.a);
        let (b, ldb) = buffer::rows(self.b);
        let ([m, n], ldc) = buffer::rows(self.out);
        let k = if self.transposed[0] { a[0] } else { a[1] };
        let stored =
            |transposed, [rows, columns]: [usize; 2]| if transposed { [columns, rows] } else { [rows, columns] };
        assert!(
            stored(self.transposed[0], a) == [m, k] && stored(self.transposed[1], b) == [k, n],
            "a product of {a:?} and {b:?} (transposed: {:?}) is no {m}x{n} matrix",
            self.transposed
        );
        assert!(k > 0, "a product over no values");
        assert!(
            self.a.dtype == DType::BF16 && self.b.dtype == DType::BF16,
            "products of bf16 matrices, not {:?} and {:?}",
            self.a.dtype,
            self.b.dtype
        );
        assert!(matches!(self.out.dtype, DType::BF16 | DType::F32), "a product into {:?}", self.out.dtype);
        let ld_added = self.added.map_or(ldc, |added| {
            let (shape, stride) = buffer::rows(added);
            assert!(shape == [m, n] && added.dtype == self.out.dtype, "{added:?} cannot be added to {:?}", self.out);
            assert!(!self.accumulates, "one matrix is added to a product, not two");
            stride
        });
        let aligned = |tensor: &CubeTensor| {
            let fits = |bytes: &u32| buffer::aligned_to(tensor, u64::from(*bytes));
            (0..=8).rev().map(|power| 1 << power).find(fits).unwrap_or(1)
        };
        Call {
            plan: Problem {
                transposed: self.transposed,
                sizes: [m, n, k].map(|size| size as u64),
                strides: [lda, ldb, ld_added, ldc].map(|stride| stride as i64),
                float_out: self.out.dtype == DType::F32,
                alignment: [self.a, self.b, self.added.unwrap_or(self.out), self.out].map(aligned),
            },
            alpha: self.alpha,
            beta: f32::from(u8::from(self.accumulates || self.added.is_some())),
        }
    }
}

/// What cuBLASLt's choice of an algorithm depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Problem {
    transposed: [bool; 2],
    /// m, n, k.
    sizes: [u64; 3],
    /// Of a, b, the added matrix, out.
    strides: [i64; 4],
    float_out: bool,
    /// Of their addresses, in bytes, up to 256.
    alignment: [u32; 4],
}

/// A product apart from its addresses.
#[derive(Clone, Debug)]
pub(super) struct Call {
    plan: Problem,
    alpha: f32,
    beta: f32,
}

/// Algorithms that the library is asked for.
const CANDIDATES: usize = 10;
/// Bytes that an algorithm may use.
const WORKSPACE: usize = 32 << 20;

/// A handle with its workspace, which one stream at a time may use, and the plans made so far.
struct Engine {
    handle: sys::cublasLtHandle_t,
    workspace: CUdeviceptr,
    plans: HashMap<Problem, Plan>,
}

/// Descriptors of one problem; they stay until the process ends.
#[derive(Clone, Copy)]
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    first: sys::cublasLtMatrixLayout_t,
    second: sys::cublasLtMatrixLayout_t,
    added: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}
// SAFETY: ids and plain numbers of the library, used on the device thread.
unsafe impl Send for Engine {}

impl Engine {
    fn new() -> Result<Self, Error> {
        if let Err(advice) = &libraries::find().products.found {
            return Err(Error::Missing(advice.clone()));
        }
        let handle = result::create_handle().map_err(|error| Error::call("cublasLtCreate", error))?;
        // Outside of CubeCL's pool: it must neither move nor be reused.
        // SAFETY: the context is current; the memory stays until the process ends.
        let workspace = unsafe { cu::malloc_sync(WORKSPACE) };
        let workspace = workspace.map_err(|error| Error::call("workspace of cuBLASLt", error))?;
        Ok(Self { handle, workspace, plans: HashMap::new() })
    }

    /// The plan for a problem, made at its first call, on whose operands algorithms are tried.
    fn plan(&mut self, call: &Call, device: u32, stream: CUstream, places: [CUdeviceptr; 4]) -> Result<Plan, Error> {
        let problem = &call.plan;
        if let Some(plan) = self.plans.get(problem) {
            return Ok(*plan);
        }
        let made = self.make(problem);
        let (mut plan, algorithms) =
            made.map_err(|error| Error::call(format!("no algorithm of cuBLASLt for {problem:?}"), error))?;
        let operations = 2.0 * problem.sizes.iter().map(|&size| size as f64).product::<f64>();
        if algorithms.len() > 1 && operations >= tune::LEAST_OPERATIONS {
            let width = if problem.float_out { 4 } else { 2 };
            let bytes = (problem.sizes[0] as usize * problem.strides[3] as usize * width).next_multiple_of(4);
            let [a, b, added, out] = places;
            let tried = tune::best(device, stream, bytes, &algorithms, |algorithm, to| {
                // What is added to in place is scratch as well.
                let added = if added == out { to } else { added };
                self.multiply(
                    &Plan { algorithm: *algorithm, ..plan },
                    [call.alpha, call.beta],
                    [a, b, added, to],
                    stream,
                )
            });
            match tried {
                Ok(best) => plan.algorithm = algorithms[best],
                // The library's own choice gives the same bits.
                Err(error) => tracing::debug!(%error, "algorithms were not tried for {}", call.name()),
            }
        }
        self.plans.insert(problem.clone(), plan);
        Ok(plan)
    }

    fn multiply(
        &self,
        plan: &Plan,
        [alpha, beta]: [f32; 2],
        [a, b, added, out]: [CUdeviceptr; 4],
        stream: CUstream,
    ) -> Result<(), Error> {
        // SAFETY: the addresses are those of live matrices of the shapes in the plan, on its device.
        let done = unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                pointer(&alpha),
                pointer(&beta),
                b as *const c_void,
                plan.first,
                a as *const c_void,
                plan.second,
                added as *const c_void,
                plan.added,
                out as *mut c_void,
                plan.out,
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        };
        done.map_err(|error| Error::call("a product", error))
    }

    /// Descriptors with the library's first choice, and its choices in order.
    fn make(&self, problem: &Problem) -> Result<(Plan, Vec<sys::cublasLtMatmulAlgo_t>), result::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Operation;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let [m, n, k] = problem.sizes;
        let [lda, ldb, ld_added, ldc] = problem.strides;
        let [ta, tb] = problem.transposed;
        let [align_a, align_b, align_added, align_out] = problem.alignment;
        let float = sys::cudaDataType_t::CUDA_R_32F;
        let brain = sys::cudaDataType_t::CUDA_R_16BF;
        let out_type = if problem.float_out { float } else { brain };
        // cuBLAS takes column-major matrices: a row-major one is its own transpose, so with
        // outᵀ = op(b)ᵀ op(a)ᵀ it gets b first.
        let stored =
            |transposed: bool, rows: u64, columns: u64| if transposed { (columns, rows) } else { (rows, columns) };
        let (rows_a, columns_a) = stored(ta, m, k);
        let (rows_b, columns_b) = stored(tb, k, n);
        // SAFETY: every attribute is given its own type's size, and no descriptor is destroyed but
        // the preference, after its use.
        unsafe {
            let operation = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, float)?;
            for (attribute, transposed) in
                [(Operation::CUBLASLT_MATMUL_DESC_TRANSA, tb), (Operation::CUBLASLT_MATMUL_DESC_TRANSB, ta)]
            {
                // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
                let transposed = i32::from(transposed);
                result::set_matmul_desc_attribute(operation, attribute, pointer(&transposed), size_of::<i32>())?;
            }
            let first = result::create_matrix_layout(brain, columns_b, rows_b, ldb)?;
            let second = result::create_matrix_layout(brain, columns_a, rows_a, lda)?;
            let added = result::create_matrix_layout(out_type, n, m, ld_added)?;
            let out = result::create_matrix_layout(out_type, n, m, ldc)?;
            let preference = result::create_matmul_pref()?;
            let workspace = WORKSPACE;
            result::set_matmul_pref_attribute(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                pointer(&workspace),
                size_of::<usize>(),
            )?;
            for (attribute, bytes) in [
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align_b),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align_a),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align_added),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align_out),
            ] {
                result::set_matmul_pref_attribute(preference, attribute, pointer(&bytes), size_of::<u32>())?;
            }
            let mut found = [const { MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed() }; CANDIDATES];
            let mut count = 0;
            let asked = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                operation,
                first,
                second,
                added,
                out,
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr().cast(),
                &mut count,
            );
            result::destroy_matmul_pref(preference)?;
            asked.result()?;
            let found = found[..count.clamp(0, CANDIDATES as i32) as usize].iter();
            let usable = found.map(|one| one.assume_init_ref()).filter(|one| one.state.result().is_ok());
            let algorithms: Vec<_> = usable.map(|one| one.algo).collect();
            match algorithms.first() {
                Some(&algorithm) => Ok((Plan { operation, first, second, added, out, algorithm }, algorithms)),
                None => Err(result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
            }
        }
    }
}

fn pointer<T>(value: &T) -> *const c_void {
    std::ptr::from_ref(value).cast()
}

impl Call {
    /// What it is, for people.
    pub(super) fn name(&self) -> String {
        let [m, n, k] = self.plan.sizes;
        let [ta, tb] = self.plan.transposed.map(|transposed| if transposed { 't' } else { 'n' });
        format!("product {m}x{n}x{k} {ta}{tb}")
    }

    /// Whether there is nothing to compute.
    pub(super) fn is_empty(&self) -> bool {
        self.plan.sizes.contains(&0)
    }

    /// Puts the product on `stream`; addresses of a, b, the added matrix, out. On the device thread.
    pub(super) fn run(&self, device: u32, stream: CUstream, [a, b, added, out]: [CUdeviceptr; 4]) -> Result<(), Error> {
        static ENGINES: LazyLock<Mutex<HashMap<(u32, usize), Engine>>> = LazyLock::new(Mutex::default);
        let mut engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (device, stream as usize);
        let engine = match engines.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Engine::new()?),
        };
        let plan = engine.plan(self, device, stream, [a, b, added, out])?;
        let done = engine.multiply(&plan, [self.alpha, self.beta], [a, b, added, out], stream);
        done.map_err(|error| Error::call(format!("product {:?}", self.plan), error))
    }
}
