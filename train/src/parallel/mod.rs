//! Training with several processes, the ranks: what they say to each other, and who holds what.
//!
//! [`Partition`] cuts the parameters into buckets and pieces, [`Collective`] is how ranks add and gather values,
//! [`Alone`] that of one rank and [`Mesh`] that of ranks connected through TCP. docs/scaling.md has the whole of it.

pub mod launch;
mod mesh;
pub mod nccl;
mod partition;
mod sum;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub use launch::Launch;
pub use mesh::Mesh;
pub use partition::{Bucket, CHUNK, Partition};
pub use sum::Tree;

use crate::Error;
use crate::config::TrainConfig;
use crate::parameters::ParameterList;

/// Values that are on their way; calling it waits for them.
pub type Pending = Box<dyn FnOnce() -> Result<Vec<f32>, Error> + Send>;

/// Values that go from each rank to the next, each of which needs those of the one before for its own.
pub struct Relay {
    /// What the rank before sends; nothing on the first rank.
    pub receive: Pending,
    /// Sends to the next rank, where there is one.
    pub send: Box<dyn FnOnce(Vec<f32>) + Send>,
}

/// What ranks do together, on float32 values and bytes in the memory of the host.
///
/// Every rank has to call the same methods in the same order. Methods that give a [`Pending`] put their part on its way
/// and return: several may be under way, and be waited for in any order. All fail with [`Error::Rank`], which names the
/// rank, when one has died, hangs or has left.
pub trait Collective: Debug + Send + Sync {
    /// Number of this rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world(&self) -> usize;

    /// Adds up `values` of all ranks, as a [`Tree`] over them, and gives this rank the piece `pieces[rank]` of the sum.
    /// Pieces follow each other and together are all of `values`.
    ///
    /// # Errors
    /// See [`Collective`].
    fn reduce_scatter(&self, values: Vec<f32>, pieces: &[Range<usize>]) -> Result<Pending, Error>;

    /// Puts together the pieces of all ranks, of which this one has `own`.
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_gather(&self, own: Vec<f32>, pieces: &[Range<usize>]) -> Result<Pending, Error>;

    /// [`Collective::all_gather`] for the rank `to` alone; the others get nothing.
    ///
    /// # Errors
    /// See [`Collective`].
    fn gather(&self, own: Vec<f32>, pieces: &[Range<usize>], to: usize) -> Result<Pending, Error>;

    /// Gives every rank the bytes of each, by rank. Few bytes: settings, counts, results.
    ///
    /// # Errors
    /// See [`Collective`].
    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error>;

    /// Makes ready for `count` values to go from rank to rank in their order, or in the other.
    ///
    /// # Errors
    /// See [`Collective`].
    fn relay(&self, count: usize, backwards: bool) -> Result<Relay, Error>;

    /// The sum of `values` of all ranks: [`Collective::reduce_scatter`], then [`Collective::all_gather`].
    ///
    /// # Errors
    /// See [`Collective`].
    fn all_reduce(&self, values: Vec<f32>, pieces: &[Range<usize>]) -> Result<Vec<f32>, Error> {
        let own = self.reduce_scatter(values, pieces)?()?;
        self.all_gather(own, pieces)?()
    }

    /// Returns when every rank has come here.
    ///
    /// # Errors
    /// See [`Collective`].
    fn barrier(&self) -> Result<(), Error> {
        self.exchange(&[]).map(drop)
    }

    /// The ranks `members`, this one among them and in ascending order, as a collective of their own, where ranks are numbered
    /// by their place in it. All ranks have to go through the same calls, each in the groups that it is in.
    fn among(&self, members: &[usize]) -> Arc<dyn Collective>;

    /// Whether all others are there as far as is known. Does not wait.
    ///
    /// # Errors
    /// See [`Collective`].
    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    /// How long a rank may give no sign of life, or be waited for.
    fn timeout(&self) -> Duration;

    /// Says goodbye: with a cause, all other ranks fail with it wherever they are waiting. Nothing may be called after.
    fn leave(&self, cause: Option<&str>);

    /// Bytes that this rank has sent to others, but for signs of life.
    fn bytes_sent(&self) -> u64;

    /// Bytes in memory of what is on its way: not sent yet, or come and not yet waited for.
    fn bytes_held(&self) -> u64 {
        0
    }
}

/// How ranks find each other.
#[derive(Clone, Copy, Debug)]
pub struct Meeting<'a> {
    /// What they run, the same for all: a process that runs something else, at the same address by mistake, is told so.
    pub run: &'a str,
    /// How long it may take, and afterwards how long a rank may give no sign of life, or be waited for, before it is given
    /// up.
    pub timeout: Duration,
    /// Once true, nobody is waited for any longer.
    pub stop: &'a AtomicBool,
}

/// The collective of the ranks that `launch` names: connected as [`Mesh::connect`] does, or alone.
///
/// # Errors
/// As [`Mesh::connect`].
pub fn connect(launch: &Launch, meeting: &Meeting<'_>) -> Result<Arc<dyn Collective>, Error> {
    Ok(match launch.world {
        1 => Alone::shared(),
        _ => Arc::new(Mesh::connect(launch, meeting)?),
    })
}

/// The ranks of a run: all, and what each is to others.
#[derive(Clone, Debug)]
pub struct Team {
    /// All ranks.
    pub all: Arc<dyn Collective>,
    /// The neighbours that together have one copy of what is sharded.
    pub inner: Arc<dyn Collective>,
    /// Those that have the same shard, one in each such neighbourhood.
    pub outer: Arc<dyn Collective>,
    /// The ranks that share the tokens of every row.
    pub sequence: Arc<dyn Collective>,
    /// The neighbours that share each block. All other groups but `copy` are of ranks that have the same part of it.
    pub tensor: Arc<dyn Collective>,
    /// The neighbours that together have one copy of the model: of each place in `inner` those of all parts of the blocks.
    pub copy: Arc<dyn Collective>,
}

impl Team {
    /// Of all ranks, as the settings divide them.
    ///
    /// # Errors
    /// [`Error::Config`] when they cannot be divided so.
    pub fn new(all: &Arc<dyn Collective>, config: &TrainConfig) -> Result<Self, Error> {
        let (rank, world) = (all.rank(), all.world());
        let tensor = config.tensor_ranks.clamp(1, world);
        config.model.part(tensor)?;
        let size = config.neighbours(config.sharding, world)?;
        let parts = config.sequence_ranks.clamp(1, world / tensor);
        let both = tensor * parts;
        // Of the neighbourhood of `size` ranks those that are `step` apart.
        let group = |size: usize, step: usize| -> Vec<usize> {
            (rank / size * size + rank % step..).step_by(step).take(size / step).collect()
        };
        let alike: Vec<usize> = (rank % size..world).step_by(size).collect();
        Ok(Self {
            inner: all.among(&group(size, tensor)),
            outer: all.among(&alike),
            sequence: all.among(&group(both, tensor)),
            tensor: all.among(&group(tensor, 1)),
            copy: all.among(&group(size, 1)),
            all: all.clone(),
        })
    }

    /// The place of this rank among those that see other tokens, and their number: ranks that share blocks count as one.
    pub fn place(&self) -> (usize, usize) {
        let parts = self.tensor.world();
        (self.all.rank() / parts, self.all.world() / parts)
    }

    /// Of what all ranks have said that of one in each such place.
    pub(crate) fn of_places<T>(&self, said: Vec<T>) -> impl Iterator<Item = T> {
        said.into_iter().step_by(self.tensor.world())
    }

    /// The rows of the global batch that this rank has, all of them or a part of their tokens: as rank so and so of so many.
    pub fn rows(&self) -> (usize, usize) {
        let ((place, places), parts) = (self.place(), self.sequence.world());
        (place / parts, places / parts)
    }

    /// How the parameters that this rank has a part of are cut.
    pub fn partition(&self, config: &TrainConfig) -> Partition {
        let list = ParameterList::part(&config.model, self.tensor.rank(), self.tensor.world());
        Partition::of(list, self.inner.world())
    }

    /// The number of this rank's shard among those of one copy of the model, and their number.
    pub(crate) fn shard(&self) -> (usize, usize) {
        let (inner, tensor) = (&self.inner, &self.tensor);
        (tensor.rank() * inner.world() + inner.rank(), tensor.world() * inner.world())
    }

    /// Whether this rank writes its shard, which others may have too.
    pub(crate) fn writes(&self) -> bool {
        self.outer.rank() == 0
    }
}

/// Of `total` things in a row those of `rank`, when `world` ranks share them.
pub fn share(total: usize, rank: usize, world: usize) -> Range<usize> {
    total * rank / world..total * (rank + 1) / world
}

/// What every rank has made, in the order of the ranks.
///
/// # Errors
/// This rank's own, or [`Error::Rank`] with that of the first other one that failed.
pub(crate) fn all_of(group: &dyn Collective, own: Result<String, Error>) -> Result<Vec<String>, Error> {
    let said = match &own {
        Ok(text) => format!("+{text}"),
        Err(error) => format!("-{error}"),
    };
    let all = group.exchange(said.as_bytes())?;
    own?;
    let texts = all.into_iter().enumerate().map(|(rank, bytes)| {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match text.strip_prefix('+') {
            Some(text) => Ok(text.to_owned()),
            None => Err(Error::Rank { rank, reason: format!("failed: {}", text.trim_start_matches('-')) }),
        }
    });
    texts.collect()
}

/// Whether any rank says so.
pub(crate) fn any(group: &dyn Collective, own: bool) -> Result<bool, Error> {
    Ok(group.exchange(&[u8::from(own)])?.concat().contains(&1))
}

/// The collective of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Alone {
    /// As the collective of a run.
    pub fn shared() -> Arc<dyn Collective> {
        Arc::new(Self)
    }
}

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn reduce_scatter(&self, values: Vec<f32>, _pieces: &[Range<usize>]) -> Result<Pending, Error> {
        Ok(Box::new(move || Ok(values)))
    }

    fn all_gather(&self, own: Vec<f32>, _pieces: &[Range<usize>]) -> Result<Pending, Error> {
        Ok(Box::new(move || Ok(own)))
    }

    fn gather(&self, own: Vec<f32>, _pieces: &[Range<usize>], _to: usize) -> Result<Pending, Error> {
        Ok(Box::new(move || Ok(own)))
    }

    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        Ok(vec![own.to_vec()])
    }

    fn relay(&self, _count: usize, _backwards: bool) -> Result<Relay, Error> {
        Ok(Relay { receive: Box::new(|| Ok(Vec::new())), send: Box::new(drop) })
    }

    fn among(&self, _members: &[usize]) -> Arc<dyn Collective> {
        Self::shared()
    }

    fn timeout(&self) -> Duration {
        Duration::MAX
    }

    fn leave(&self, _cause: Option<&str>) {}

    fn bytes_sent(&self) -> u64 {
        0
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::net::TcpListener;

    use super::*;

    static GO_ON: AtomicBool = AtomicBool::new(false);

    /// What `work` gives on each of `world` ranks, which are threads.
    pub(crate) fn together<T: Send>(world: usize, work: impl Fn(Arc<dyn Collective>) -> T + Sync) -> Vec<T> {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let work = &work;
        std::thread::scope(|scope| {
            let rank = |rank| {
                let master = ("127.0.0.1".to_owned(), free.port());
                let launch = Launch { rank, world, local_rank: rank, master, job: None };
                let meeting = Meeting { run: "a run", timeout: Duration::from_secs(60), stop: &GO_ON };
                scope.spawn(move || work(connect(&launch, &meeting).unwrap()))
            };
            let ranks: Vec<_> = (0..world).map(rank).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }
}
