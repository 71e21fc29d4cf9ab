//! The device a command runs on, chosen at run time.

use std::fmt;
use std::str::FromStr;

pub use burn::tensor::Device;

use crate::{Error, cuda};

/// What `--device` says: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device when there is one that can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let index = |index: &str| index.parse().ok().map(Self::Cuda);
        let choice = match text.split_once(':') {
            None if text == "auto" => Some(Self::Auto),
            None if text == "cpu" => Some(Self::Cpu),
            None if text == "cuda" => Some(Self::Cuda(0)),
            Some(("cuda", number)) => index(number),
            _ => None,
        };
        choice.ok_or_else(|| Error::Device {
            device: text.to_owned(),
            reason: "is not auto, cpu, cuda or cuda:N".to_owned(),
        })
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl DeviceChoice {
    /// The Burn device of this choice. Without CUDA `auto` is the CPU.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason when the CUDA device that was asked for cannot be used.
    pub fn select(self) -> Result<Device, Error> {
        Ok(Device::from(self.resolve(cuda_devices())?))
    }

    /// The choice for the rank with this number on its host: CUDA devices count on from the one that is named.
    #[must_use]
    pub fn for_rank(self, local_rank: usize) -> Self {
        match self {
            Self::Cpu => Self::Cpu,
            Self::Cuda(first) => Self::Cuda(first + local_rank),
            Self::Auto if local_rank > 0 && cuda_devices().is_ok_and(|count| count > 0) => Self::Cuda(local_rank),
            Self::Auto => Self::Auto,
        }
    }

    /// The choice with `auto` decided, for `cuda` devices or the reason why there are none.
    fn resolve(self, cuda: Result<usize, String>) -> Result<Place, Error> {
        let error = |reason| Error::Device { device: self.to_string(), reason };
        match (self, cuda) {
            (Self::Cpu, _) | (Self::Auto, Ok(0) | Err(_)) => Ok(Place::Cpu),
            (Self::Auto, Ok(_)) => Ok(Place::Cuda(0)),
            (Self::Cuda(index), Ok(count)) if index < count => Ok(Place::Cuda(index)),
            (Self::Cuda(_), Ok(count)) => Err(error(format!("the driver shows {count} CUDA devices"))),
            (Self::Cuda(_), Err(reason)) => Err(error(reason)),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    Cpu,
    Cuda(usize),
}

impl From<Place> for Device {
    fn from(place: Place) -> Self {
        match place {
            Place::Cpu => Self::flex(),
            Place::Cuda(index) => Self::cuda(index),
        }
    }
}

/// Number of CUDA devices, or why CUDA cannot be used.
///
/// # Errors
/// The library that is missing or the driver's message.
pub fn cuda_devices() -> Result<usize, String> {
    // The bindings panic at the first call into a library that is not there: look before.
    let libraries = cuda::libraries::find();
    for library in [&libraries.driver, &libraries.compiler] {
        if let Err(advice) = &library.found {
            return Err(advice.clone());
        }
    }
    cuda::device_count().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_and_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:7"] {
            let choice: DeviceChoice = text.parse().unwrap();
            assert_eq!(choice.to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(0));
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:1"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }

    #[test]
    fn auto_takes_cuda_only_where_it_is() {
        let none = || Err("no driver".to_owned());
        assert_eq!(DeviceChoice::Auto.resolve(Ok(2)).unwrap(), Place::Cuda(0));
        assert_eq!(DeviceChoice::Auto.resolve(Ok(0)).unwrap(), Place::Cpu);
        assert_eq!(DeviceChoice::Auto.resolve(none()).unwrap(), Place::Cpu);
        assert_eq!(DeviceChoice::Cpu.resolve(Ok(2)).unwrap(), Place::Cpu);
        assert_eq!(DeviceChoice::Cuda(1).resolve(Ok(2)).unwrap(), Place::Cuda(1));
        let error = DeviceChoice::Cuda(2).resolve(Ok(2)).unwrap_err();
        assert_eq!(error.to_string(), "device cuda:2: the driver shows 2 CUDA devices");
        let error = DeviceChoice::Cuda(0).resolve(none()).unwrap_err();
        assert_eq!(error.to_string(), "device cuda:0: no driver");
    }

    #[test]
    fn asking_this_machine_does_not_panic() {
        let found = cuda_devices();
        let index = found.clone().unwrap_or(0);
        assert!(DeviceChoice::Cuda(index).select().is_err(), "{found:?}");
        assert!(DeviceChoice::Auto.select().is_ok());
    }
}
