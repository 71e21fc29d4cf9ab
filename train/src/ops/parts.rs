//! Matrices of which several GPUs have parts, on CUDA.

use burn_cubecl::tensor::CubeTensor;

use crate::cuda::{self, Grid, Kernel, Source, Work};
use crate::parameters::Place;

pub(crate) static SOURCE: Source = Source { name: "parts.cu", text: include_str!("../kernels/parts.cu") };

/// Puts the bf16 values `part` of a matrix to their `place` in the flat buffer `whole` of a model.
///
/// # Panics
/// When runs do not begin and end at multiples of eight values, as all of a model in bf16 do.
pub(crate) fn put(part: &CubeTensor, place: Place, whole: &CubeTensor) {
    let count = part.meta.shape().num_elements();
    let eighths = |values: usize| {
        assert!(values.is_multiple_of(8), "{place:?} of {count} values is no matter of eights");
        cuda::u64((values / 8) as u64)
    };
    let Place { begin, first, run, stride } = place;
    let end = whole.meta.shape().num_elements();
    let to = cuda::flat_view(whole, begin + first, [end - begin - first]);
    let last = count.div_ceil(run).saturating_sub(1);
    assert!(last * stride + run <= end - begin - first, "{place:?} of {count} values in {end}");
    let mut work = Work::near(part);
    let arguments = [cuda::read(part), cuda::write(&to), eighths(run), eighths(stride), eighths(count)];
    work.launch(&Kernel::new(&SOURCE, "put_part"), Grid::new((count / 8).div_ceil(256) as u32, 256), &arguments);
    work.submit();
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::config::ModelConfig;
    use crate::ops::testing::cuda_device;
    use crate::parameters::ParameterList;

    #[test]
    fn parts_of_all_matrices_make_the_whole_model() {
        let Some(device) = cuda_device("parts of matrices") else { return };
        let near = cuda::of(burn::tensor::Tensor::<1>::zeros([8], &device));
        let model = ModelConfig {
            vocab_size: 24,
            decoder_embed_dim: 16,
            decoder_layers: 2,
            decoder_attention_heads: 6,
            hidden_dim: 48,
            glu_dim: 72,
            linear_use_lrpe_list: vec![1, 0],
            ..ModelConfig::default()
        };
        let total = model.parameters();
        // Numbers that bf16 holds, and that a shift by eight values changes.
        let value = |at: usize| (at % 251) as f32;
        for parts in [1, 3] {
            let whole = cuda::empty(&near, [total], DType::BF16);
            for part in 0..parts {
                for parameter in ParameterList::part(&model, part, parts).iter() {
                    let places = parameter.place.ranges(0..parameter.range().len());
                    let values: Vec<f32> = places.flatten().map(value).collect();
                    put(&cuda::upload_bf16(&near.device, &values), parameter.place, &whole);
                }
            }
            let got = cuda::download_floats(&whole).unwrap();
            assert!(got.iter().enumerate().all(|(at, got)| *got == value(at)), "{parts}");
        }
    }
}
