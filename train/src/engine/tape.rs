//! The step on one tape of Burn's, in float32, of one rank: on CUDA. On the CPU it is what [`super::host`] is compared with.

use burn::tensor::{Device, Tensor};

use super::{Engine, Outcome, Pending, Snapshot};
use crate::config::TrainConfig;
use crate::generate::{ModelReader, Reader};
use crate::optimizer::AdamW;
use crate::{Batch, Error, Model};

/// A model, its optimizer and what became of the last step.
pub(super) struct Tape {
    model: Model,
    optimizer: AdamW,
    /// Rows of a micro batch.
    rows: usize,
    z_loss: f64,
    outcome: Outcome,
}

impl Tape {
    pub(super) fn new(config: &TrainConfig, device: &Device, snapshot: Snapshot) -> Result<Self, Error> {
        let Snapshot { values, first, second, taken, skipped } = snapshot;
        let model = Model::from_values(&config.model, values, device)?;
        Ok(Self {
            optimizer: AdamW::with_state(&config.optimizer, &model, taken, first, second),
            model,
            rows: config.batch,
            z_loss: config.z_loss,
            outcome: Outcome { loss: f64::NAN, grad_norm: f64::NAN, skipped, skipped_last: 0 },
        })
    }
}

impl Engine for Tape {
    fn step(&mut self, batch: &Batch, rate: f64) -> Result<(), Error> {
        let mut sum: Option<Vec<Tensor<2>>> = None;
        let loss = self.model.gradients(batch, self.rows, self.z_loss, |part| {
            sum = Some(match sum.take() {
                None => part,
                Some(sum) => sum.into_iter().zip(part).map(|(a, b)| a + b).collect(),
            });
        })?;
        let grad_norm = self.optimizer.step(&mut self.model, sum.unwrap_or_default(), rate);
        let outcome = &mut self.outcome;
        (outcome.loss, outcome.grad_norm) = (loss, grad_norm);
        if grad_norm.is_finite() {
            outcome.skipped_last = 0;
        } else {
            outcome.skipped += 1;
            outcome.skipped_last += 1;
        }
        Ok(())
    }

    fn outcome(&mut self) -> Result<Outcome, Error> {
        Ok(self.outcome)
    }

    fn is_synchronous(&self) -> bool {
        true
    }

    fn loss(&self, batch: &Batch) -> Result<f64, Error> {
        self.model.loss(batch, self.rows)
    }

    fn snapshot(&mut self) -> Result<Pending, Error> {
        let [first, second] = self.optimizer.moments();
        let (taken, skipped) = (self.optimizer.steps(), self.outcome.skipped);
        let snapshot = Snapshot { values: self.model.values(), first, second, taken, skipped };
        Ok(Box::new(move || Ok(snapshot)))
    }

    fn reader(&mut self) -> Result<Option<Box<dyn Reader + '_>>, Error> {
        Ok(Some(Box::new(ModelReader::new(&self.model))))
    }
}
