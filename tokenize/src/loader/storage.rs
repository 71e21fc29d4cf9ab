//! Where shards lie: in local files, or in an object store that is asked for ranges of bytes.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use object_store::{GetOptions, ObjectStore};
use tokio::runtime::Runtime;

/// A shard in its storage, by its number in the data set.
pub struct Object<'a> {
    /// The number.
    pub number: u32,
    /// The path of the file, or of the object in its store.
    pub path: &'a Path,
}

/// Reads ranges of shards.
#[derive(Clone)]
pub enum Storage {
    /// Local files.
    Local,
    /// Objects of a store.
    Remote(Arc<Remote>),
}

/// An object store behind a bounded cache.
pub struct Remote {
    store: Arc<dyn ObjectStore>,
    cache: Mutex<Cache>,
    /// Runs the requests, so that they go on while a batch is made. Taken when dropped.
    runtime: Option<Runtime>,
}

/// Ranges that were read or are being read, the oldest of which go first when there are too many.
#[derive(Default)]
struct Cache {
    entries: HashMap<CacheKey, Entry>,
    limit: usize,
    bytes: usize,
    /// Counts uses: what was used longest ago goes first.
    clock: u64,
}

/// Number of a shard, and the bounds of a range. Both of them: that of a footer may begin where a row group does.
type CacheKey = (u32, u64, u64);

fn key_of(object: &Object<'_>, range: &Range<u64>) -> CacheKey {
    (object.number, range.start, range.end)
}

struct Entry {
    content: Content,
    bytes: usize,
    used: u64,
}

enum Content {
    Here(Bytes),
    Coming(Receiver<std::io::Result<Bytes>>),
}

impl Storage {
    /// Bytes of a shard, where that takes no request to tell.
    pub fn length(&self, object: &Object<'_>) -> std::io::Result<Option<u64>> {
        match self {
            Self::Local => Ok(Some(std::fs::metadata(object.path)?.len())),
            Self::Remote(_) => Ok(None),
        }
    }

    /// A range of bytes of a shard.
    pub fn read(&self, object: &Object<'_>, range: Range<u64>) -> std::io::Result<Bytes> {
        match self {
            Self::Local => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                File::open(object.path)?.read_exact_at(&mut bytes, range.start)?;
                Ok(bytes.into())
            }
            Self::Remote(remote) => remote.read(object, range),
        }
    }

    /// Begin to read ranges that are wanted soon, as far as the cache holds them.
    pub fn read_ahead(&self, object: &Object<'_>, ranges: impl Iterator<Item = Range<u64>>) {
        if let Self::Remote(remote) = self {
            for range in ranges {
                let mut cache = remote.cache();
                let (key, bytes) = (key_of(object, &range), (range.end - range.start) as usize);
                if cache.entries.contains_key(&key) {
                    continue;
                }
                // Half of the cache is for what was read, the other half for what is coming.
                let coming = cache.entries.values().filter(|e| matches!(e.content, Content::Coming(_)));
                if coming.map(|entry| entry.bytes).sum::<usize>() + bytes > cache.limit / 2 {
                    break;
                }
                let content = Content::Coming(remote.request(object, range));
                cache.put(key, content, bytes);
            }
        }
    }
}

impl Remote {
    /// Objects of `store`, of which at most `cache_bytes` are kept in memory (one range more, if that
    /// alone is larger).
    pub fn new(store: Arc<dyn ObjectStore>, cache_bytes: usize) -> std::io::Result<Arc<Self>> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("shards").enable_all().build()?;
        let cache = Cache { limit: cache_bytes, ..Cache::default() };
        Ok(Arc::new(Self { store, cache: Mutex::new(cache), runtime: Some(runtime) }))
    }

    /// All bytes of an object, past the cache.
    pub fn read_whole(&self, path: &object_store::path::Path) -> std::io::Result<Bytes> {
        received(self.get(path.clone(), GetOptions::default()))
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ask for a range of bytes.
    fn request(&self, object: &Object<'_>, range: Range<u64>) -> Receiver<std::io::Result<Bytes>> {
        match object_store::path::Path::parse(object.path.to_string_lossy()) {
            Ok(path) => self.get(path, GetOptions::new().with_range(Some(range))),
            Err(error) => {
                let (send, receive) = channel();
                // The receiver is here.
                let _ = send.send(Err(std::io::Error::other(error)));
                receive
            }
        }
    }

    /// Ask the store on the runtime's thread: the caller may stand in a runtime of its own.
    fn get(&self, path: object_store::path::Path, options: GetOptions) -> Receiver<std::io::Result<Bytes>> {
        let (send, receive) = channel();
        let store = self.store.clone();
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move {
                let read = async { store.get_opts(&path, options).await?.bytes().await };
                // Nobody waits when the loader is gone.
                let _ = send.send(read.await.map_err(std::io::Error::from));
            });
        }
        receive
    }

    fn read(&self, object: &Object<'_>, range: Range<u64>) -> std::io::Result<Bytes> {
        let (key, bytes) = (key_of(object, &range), (range.end - range.start) as usize);
        // Taken out while it is waited for, so that other streams are not kept from the cache.
        let content = self.cache().take(key);
        let read = match content {
            Some(Content::Here(bytes)) => bytes,
            Some(Content::Coming(receiver)) => received(receiver)?,
            None => received(self.request(object, range))?,
        };
        if read.len() != bytes {
            let reason = format!("{} bytes instead of {bytes}", read.len());
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, reason));
        }
        self.cache().put(key, Content::Here(read.clone()), bytes);
        Ok(read)
    }
}

fn received(receiver: Receiver<std::io::Result<Bytes>>) -> std::io::Result<Bytes> {
    receiver.recv().unwrap_or_else(|_| Err(std::io::Error::other("the request was given up")))
}

impl Cache {
    fn take(&mut self, key: CacheKey) -> Option<Content> {
        let entry = self.entries.remove(&key)?;
        self.bytes -= entry.bytes;
        Some(entry.content)
    }

    fn put(&mut self, key: CacheKey, content: Content, bytes: usize) {
        self.take(key);
        while self.bytes + bytes > self.limit
            && let Some(oldest) = self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key)
        {
            self.take(oldest);
        }
        self.clock += 1;
        self.bytes += bytes;
        self.entries.insert(key, Entry { content, bytes, used: self.clock });
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // A runtime must not be waited for where another one runs.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;

    #[test]
    fn the_cache_holds_no_more_than_it_may() {
        const SIZE: u64 = 200_000;
        const LIMIT: usize = 10_000;
        let store = InMemory::new();
        let bytes: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
        let path = object_store::path::Path::from("shard");
        futures::executor::block_on(store.put(&path, bytes.clone().into())).unwrap();
        let remote = Remote::new(Arc::new(store), LIMIT).unwrap();
        let storage = Storage::Remote(remote.clone());
        let object = Object { number: 0, path: Path::new("shard") };
        let mut most = 0;
        // Ranges of all sizes up to the limit, three from each place, most of them asked for ahead and more than once.
        for i in 0..2000u64 {
            let range = |i: u64| {
                let start = (i / 3 * 7919) % (SIZE - LIMIT as u64);
                start..start + 1 + (i * 31) % (LIMIT as u64 - 1)
            };
            storage.read_ahead(&object, (i..i + 9).map(range));
            let Range { start, end } = range(i);
            let read = storage.read(&object, start..end).unwrap();
            assert_eq!(read[..], bytes[start as usize..end as usize]);
            let cache = remote.cache();
            assert_eq!(cache.bytes, cache.entries.values().map(|entry| entry.bytes).sum::<usize>());
            assert!(cache.bytes <= LIMIT, "{} bytes are kept", cache.bytes);
            most = most.max(cache.bytes);
        }
        assert!(most > LIMIT / 2, "{most}");
    }
}
