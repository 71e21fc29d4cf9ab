//! Ranks connected through TCP, every one with every other.
//!
//! Rank 0 listens at MASTER_ADDR:MASTER_PORT until all have come, tells each where the others listen, and they connect.
//! Of each connection a thread reads, so that a peer that ends is noticed whatever this rank does, and a thread writes,
//! so that no two ranks wait for each other's buffers. An idle writer gives signs of life.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::launch::Launch;
use super::{Collective, Meeting, Pending, Relay, Tree};
use crate::Error;
use crate::tensors::{bytes, floats};

/// First bytes of a greeting: who connects by mistake is told apart.
const MAGIC: &str = "fulgurite mesh 2";
/// Longest text of the rendezvous, and the longest greeting.
const MOST_TEXT: usize = 1 << 24;
const MOST_HELLO: usize = 1 << 14;
/// How long a greeting may take.
const HELLO: Duration = Duration::from_secs(5);
/// Bytes that are read at once.
const PIECE: usize = 1 << 20;
/// Between two attempts to connect, and two looks at a listener.
const RETRY: Duration = Duration::from_millis(20);
/// Longest wait without a look at the stop flag.
const LOOK: Duration = Duration::from_millis(500);
/// How long a rank that fails tries to tell the others.
const FAREWELL: Duration = Duration::from_secs(2);
/// Waits for nobody.
const NOBODY: usize = usize::MAX;

/// What ranks are doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    ReduceScatter,
    AllGather,
    Exchange,
    Relay,
    Gather,
}

impl Operation {
    fn of(code: u8) -> Option<Self> {
        [Self::ReduceScatter, Self::AllGather, Self::Exchange, Self::Relay, Self::Gather]
            .into_iter()
            .find(|operation| *operation as u8 == code)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::Exchange => "exchange",
            Self::Relay => "relay",
            Self::Gather => "gather",
        })
    }
}

/// What goes over a connection: one byte of kind, one of operation, the number of the operation and the length of
/// what follows, both in eight bytes, least first.
enum Frame {
    /// A part of an operation.
    Data(Operation, u64, Arc<Part>),
    /// Good-bye, with the cause where it is a failure.
    Farewell(Option<String>),
}

/// What is to be sent, to one peer or to several; it counts as held until all have it.
struct Part {
    bytes: Box<[u8]>,
    held: Arc<AtomicU64>,
}

impl Drop for Part {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes.len() as u64, Ordering::Relaxed);
    }
}

const DATA: u8 = 0;
const PULSE: u8 = 1;
const DONE: u8 = 2;
const FAILED: u8 = 3;
const HEAD: usize = 18;

fn head(kind: u8, operation: u8, number: u64, length: usize) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    (head[0], head[1]) = (kind, operation);
    head[2..10].copy_from_slice(&number.to_le_bytes());
    head[10..].copy_from_slice(&(length as u64).to_le_bytes());
    head
}

/// How a peer's part of a connection ended.
#[derive(Clone, Debug)]
enum End {
    /// It is done.
    Done,
    /// It failed and said why.
    Failed(String),
    /// The connection is gone.
    Lost(String),
}

/// What has come from one peer.
struct From {
    /// By number of the operation.
    parts: BTreeMap<u64, (Operation, Vec<u8>)>,
    /// When anything came.
    heard: Instant,
    /// Whom it waits for, as far as it has said.
    waits_for: usize,
    end: Option<End>,
}

/// What the threads of a mesh share.
struct Shared {
    rank: usize,
    timeout: Duration,
    /// By rank; that of this rank stays empty.
    inbox: Mutex<Vec<From>>,
    arrived: Condvar,
    /// Number of the next operation.
    next: AtomicU64,
    /// Bytes sent, but for signs of life.
    sent: AtomicU64,
    /// Bytes of parts that are not sent, or not taken.
    held: Arc<AtomicU64>,
    /// Whom this rank waits for.
    waits_for: AtomicUsize,
}

/// The way to one peer.
struct Peer {
    outbox: Sender<Frame>,
    stream: TcpStream,
    /// Closed when the writer is done.
    written: Mutex<Receiver<()>>,
}

/// The connections of a rank.
struct Links {
    shared: Arc<Shared>,
    /// By rank; none for this rank.
    peers: Vec<Option<Peer>>,
    left: AtomicBool,
}

/// The collective of ranks that are connected through TCP: of all, or of some.
pub struct Mesh {
    links: Arc<Links>,
    /// The ranks, by their place in this collective.
    members: Vec<usize>,
    /// The place of this one.
    place: usize,
}

impl fmt::Debug for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {:?}", self.links.shared.rank, self.members)
    }
}

impl Mesh {
    /// Finds the other ranks and connects with each.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] with the ranks that did not come in time, the other run that meets there, or what else is wrong,
    /// [`Error::Interrupted`] when it is to stop before all have come.
    pub fn connect(launch: &Launch, meeting: &Meeting<'_>) -> Result<Self, Error> {
        let timeout = meeting.timeout;
        let run = match &launch.job {
            Some(job) => format!("{} of job {job}", meeting.run),
            None => meeting.run.to_owned(),
        };
        let deadline = Instant::now() + timeout;
        let streams = Rendezvous { launch, run, stop: meeting.stop, deadline, timeout }.meet()?;
        let now = Instant::now();
        let inbox = (0..launch.world)
            .map(|_| From { parts: BTreeMap::new(), heard: now, waits_for: NOBODY, end: None })
            .collect();
        let shared = Arc::new(Shared {
            rank: launch.rank,
            timeout,
            inbox: Mutex::new(inbox),
            arrived: Condvar::new(),
            next: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            held: Arc::default(),
            waits_for: AtomicUsize::new(NOBODY),
        });
        let mut peers = Vec::with_capacity(launch.world);
        for (rank, stream) in streams.into_iter().enumerate() {
            let peer = stream.map(|stream| Peer::start(rank, stream, &shared));
            peers.push(peer.transpose().map_err(|error| launch.failed(format!("a thread cannot start: {error}")))?);
        }
        let links = Arc::new(Links { shared, peers, left: AtomicBool::new(false) });
        Ok(Self { links, members: (0..launch.world).collect(), place: launch.rank })
    }

    /// Sends a part of an operation to the rank at a place.
    fn send(&self, to: usize, operation: Operation, number: u64, part: Arc<Part>) {
        self.links.send(self.members[to], operation, number, part);
    }

    fn begin(&self) -> Result<u64, Error> {
        let shared = &self.links.shared;
        if self.links.left.load(Ordering::Relaxed) {
            return Err(Error::Rank { rank: shared.rank, reason: "has left the others already".to_owned() });
        }
        Ok(shared.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The values of all members, of which this one has `own` and the others send theirs.
    fn put_together(&self, own: Vec<f32>, pieces: &[Range<usize>], operation: Operation, number: u64) -> Pending {
        let (shared, members, pieces) = (self.links.shared.clone(), self.members.clone(), pieces.to_vec());
        Box::new(move || {
            let mut values = Vec::with_capacity(pieces.last().map_or(0, |piece| piece.end));
            for (from, piece) in members.into_iter().zip(pieces) {
                if from == shared.rank {
                    values.extend_from_slice(&own);
                } else {
                    values.extend(shared.values(from, operation, number, piece.len())?);
                }
            }
            Ok(values)
        })
    }

    /// The places of the others.
    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.members.len()).filter(|place| *place != self.place)
    }
}

impl Collective for Mesh {
    fn rank(&self) -> usize {
        self.place
    }

    fn world(&self) -> usize {
        self.members.len()
    }

    fn reduce_scatter(&self, values: Vec<f32>, pieces: &[Range<usize>]) -> Result<Pending, Error> {
        let number = self.begin()?;
        for to in self.others() {
            let part = self.links.shared.part(&bytes(&values[pieces[to].clone()]));
            self.send(to, Operation::ReduceScatter, number, part);
        }
        let (shared, members) = (self.links.shared.clone(), self.members.clone());
        let own = values[pieces[self.place].clone()].to_vec();
        Ok(Box::new(move || {
            let (mut tree, count) = (Tree::default(), own.len());
            let mut own = Some(own);
            for from in members {
                tree.push(match own.take_if(|_| from == shared.rank) {
                    Some(own) => own,
                    None => shared.values(from, Operation::ReduceScatter, number, count)?,
                });
            }
            Ok(tree.finish().unwrap_or_default())
        }))
    }

    fn all_gather(&self, own: Vec<f32>, pieces: &[Range<usize>]) -> Result<Pending, Error> {
        let number = self.begin()?;
        let part = self.links.shared.part(&bytes(&own));
        for to in self.others() {
            self.send(to, Operation::AllGather, number, part.clone());
        }
        Ok(self.put_together(own, pieces, Operation::AllGather, number))
    }

    fn gather(&self, own: Vec<f32>, pieces: &[Range<usize>], to: usize) -> Result<Pending, Error> {
        let number = self.begin()?;
        if to == self.place {
            return Ok(self.put_together(own, pieces, Operation::Gather, number));
        }
        self.send(to, Operation::Gather, number, self.links.shared.part(&bytes(&own)));
        Ok(Box::new(|| Ok(Vec::new())))
    }

    fn exchange(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let number = self.begin()?;
        let part = self.links.shared.part(own);
        for to in self.others() {
            self.send(to, Operation::Exchange, number, part.clone());
        }
        let shared = &self.links.shared;
        let parts = self.members.iter().map(|&from| match from == shared.rank {
            true => Ok(own.to_vec()),
            false => shared.take(from, Operation::Exchange, number),
        });
        parts.collect()
    }

    fn relay(&self, count: usize, backwards: bool) -> Result<Relay, Error> {
        let number = self.begin()?;
        let [before, after] = [self.place.checked_sub(1), Some(self.place + 1)];
        let [from, to] = if backwards { [after, before] } else { [before, after] };
        let member = |place: Option<usize>| place.and_then(|place| self.members.get(place)).copied();
        let (shared, links) = (self.links.shared.clone(), self.links.clone());
        let (from, to) = (member(from), member(to));
        Ok(Relay {
            receive: Box::new(move || match from {
                Some(from) => shared.values(from, Operation::Relay, number, count),
                None => Ok(Vec::new()),
            }),
            send: Box::new(move |values| {
                if let Some(to) = to {
                    links.send(to, Operation::Relay, number, links.shared.part(&bytes(&values)));
                }
            }),
        })
    }

    fn among(&self, members: &[usize]) -> Arc<dyn Collective> {
        let members: Vec<usize> = members.iter().map(|place| self.members[*place]).collect();
        let place = members.iter().position(|rank| *rank == self.links.shared.rank);
        let place = place.unwrap_or_else(|| unreachable!("a rank makes groups that it is in"));
        Arc::new(Self { links: self.links.clone(), members, place })
    }

    fn check(&self) -> Result<(), Error> {
        let shared = &self.links.shared;
        shared.gone(&shared.inbox()).map_or(Ok(()), Err)
    }

    fn timeout(&self) -> Duration {
        self.links.shared.timeout
    }

    fn leave(&self, cause: Option<&str>) {
        self.links.leave(cause);
    }

    fn bytes_sent(&self) -> u64 {
        self.links.shared.sent.load(Ordering::Relaxed)
    }

    fn bytes_held(&self) -> u64 {
        self.links.shared.held.load(Ordering::Relaxed)
    }
}

impl Links {
    /// Sends a part of an operation to a rank.
    fn send(&self, to: usize, operation: Operation, number: u64, part: Arc<Part>) {
        if let Some(peer) = &self.peers[to] {
            self.shared.sent.fetch_add((HEAD + part.bytes.len()) as u64, Ordering::Relaxed);
            // A writer that is gone has left its reason in the inbox, where whoever waits finds it.
            let _ = peer.outbox.send(Frame::Data(operation, number, part));
        }
    }

    fn leave(&self, cause: Option<&str>) {
        if self.left.swap(true, Ordering::Relaxed) {
            return;
        }
        for peer in self.peers.iter().flatten() {
            let _ = peer.outbox.send(Frame::Farewell(cause.map(str::to_owned)));
        }
        // What was sent before has to arrive; but a rank that fails is not held up by one that hangs.
        let deadline = Instant::now() + if cause.is_some() { FAREWELL } else { self.shared.timeout };
        for peer in self.peers.iter().flatten() {
            let written = peer.written.lock().unwrap_or_else(PoisonError::into_inner);
            // Ends with the writer, which sends nothing here.
            if written.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                == Err(RecvTimeoutError::Timeout)
            {
                let _ = peer.stream.shutdown(std::net::Shutdown::Both);
            }
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.leave(Some("it ended early"));
    }
}

impl Peer {
    /// Starts the threads of the connection to `rank`.
    fn start(rank: usize, stream: TcpStream, shared: &Arc<Shared>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(shared.timeout))?;
        let (outbox, frames) = channel();
        let (done, written) = channel();
        let (mut from, mut to) = (stream.try_clone()?, stream.try_clone()?);
        let reader = shared.clone();
        std::thread::Builder::new().name(format!("from rank {rank}")).spawn(move || {
            let end = reader.receive(rank, &mut from);
            reader.ended(rank, end);
        })?;
        let writer = shared.clone();
        std::thread::Builder::new().name(format!("to rank {rank}")).spawn(move || {
            // Why a connection broke is in what was sent before it did: the reader tells that.
            if let Err(error) = writer.write(&frames, &mut to)
                && matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
            {
                writer.ended(rank, lost(&error));
            }
            drop(done);
        })?;
        Ok(Self { outbox, stream, written: Mutex::new(written) })
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Vec<From>> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A part to be sent.
    fn part(&self, bytes: &[u8]) -> Arc<Part> {
        self.held.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Arc::new(Part { bytes: bytes.into(), held: self.held.clone() })
    }

    /// Notes how the connection to a peer ended, the first time.
    fn ended(&self, rank: usize, end: End) {
        self.inbox()[rank].end.get_or_insert(end);
        self.arrived.notify_all();
    }

    /// Reads from a peer until it has no more to say.
    fn receive(&self, rank: usize, from: &mut TcpStream) -> End {
        loop {
            let mut head = [0; HEAD];
            if let Err(error) = from.read_exact(&mut head) {
                return lost(&error);
            }
            let [kind, operation, numbers @ ..] = head;
            let word = |at: usize| {
                let bytes: [u8; 8] = std::array::from_fn(|i| numbers[at + i]);
                u64::from_le_bytes(bytes)
            };
            let (number, length) = (word(0), word(8) as usize);
            let mut part = Vec::new();
            while part.len() < length {
                let begin = part.len();
                let more = PIECE.min(length - begin);
                part.reserve_exact(more);
                part.resize(begin + more, 0);
                self.held.fetch_add(more as u64, Ordering::Relaxed);
                if let Err(error) = from.read_exact(&mut part[begin..]) {
                    return lost(&error);
                }
                self.inbox()[rank].heard = Instant::now();
            }
            let text = || String::from_utf8_lossy(&part).into_owned();
            if kind != DATA {
                self.held.fetch_sub(part.len() as u64, Ordering::Relaxed);
            }
            let mut inbox = self.inbox();
            let peer = &mut inbox[rank];
            peer.heard = Instant::now();
            match (kind, Operation::of(operation)) {
                (DATA, Some(operation)) => {
                    peer.parts.insert(number, (operation, part));
                }
                (PULSE, _) => peer.waits_for = number as usize,
                (DONE, _) => return End::Done,
                (FAILED, _) => return End::Failed(text()),
                _ => return End::Lost(format!("sent what no version of this program sends ({kind}, {operation})")),
            }
            drop(inbox);
            self.arrived.notify_all();
        }
    }

    /// Writes what is to be sent to a peer, and signs of life in between, until the farewell.
    fn write(&self, frames: &Receiver<Frame>, to: &mut TcpStream) -> io::Result<()> {
        let pulse = (self.timeout / 5).clamp(Duration::from_millis(20), Duration::from_secs(5));
        loop {
            match frames.recv_timeout(pulse) {
                Ok(Frame::Data(operation, number, part)) => {
                    to.write_all(&head(DATA, operation as u8, number, part.bytes.len()))?;
                    to.write_all(&part.bytes)?;
                }
                Ok(Frame::Farewell(cause)) => {
                    let text = cause.as_deref().unwrap_or("");
                    let kind = if cause.is_some() { FAILED } else { DONE };
                    to.write_all(&head(kind, 0, 0, text.len()))?;
                    to.write_all(text.as_bytes())?;
                    return to.shutdown(std::net::Shutdown::Write);
                }
                Err(RecvTimeoutError::Timeout) => {
                    to.write_all(&head(PULSE, 0, self.waits_for.load(Ordering::Relaxed) as u64, 0))?;
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Waits for a peer's part of an operation.
    fn take(&self, from: usize, operation: Operation, number: u64) -> Result<Vec<u8>, Error> {
        let begin = Instant::now();
        let mut inbox = self.inbox();
        self.waits_for.store(from, Ordering::Relaxed);
        let part = loop {
            if let Some(part) = inbox[from].parts.remove(&number) {
                break Ok(part);
            }
            if let Some(error) = self.fault(&inbox, from, operation, begin.elapsed()) {
                break Err(error);
            }
            let waited = self.arrived.wait_timeout(inbox, (self.timeout / 10).min(Duration::from_millis(200)));
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(inbox);
        self.waits_for.store(NOBODY, Ordering::Relaxed);
        let (has, part) = part?;
        self.held.fetch_sub(part.len() as u64, Ordering::Relaxed);
        if has == operation {
            return Ok(part);
        }
        let reason = format!("is in {has} {number} where rank {} is in {operation}", self.rank);
        Err(Error::Rank { rank: from, reason })
    }

    /// Why it is of no use to wait for `from` any longer.
    fn fault(&self, inbox: &[From], from: usize, operation: Operation, waited: Duration) -> Option<Error> {
        if let Some(error) = self.gone(inbox) {
            return Some(error);
        }
        let fault = |reason| Some(Error::Rank { rank: from, reason });
        if matches!(inbox[from].end, Some(End::Done)) {
            return fault("has left, as if all were done".to_owned());
        }
        // Whoever waits in its turn will tell whom it waits for; but not for ever.
        let patience = match inbox[from].waits_for {
            NOBODY => self.timeout,
            _ => 2 * self.timeout,
        };
        if waited < patience {
            return None;
        }
        let seconds = waited.as_secs_f64();
        fault(format!("lives but did not come to the next {operation} for {seconds:.1} s: it hangs"))
    }

    /// A rank that is lost, silent or has failed.
    fn gone(&self, inbox: &[From]) -> Option<Error> {
        let fault = |rank, reason| Some(Error::Rank { rank, reason });
        let peers = || inbox.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        // First what was seen, then what was heard of from others.
        for (rank, peer) in peers() {
            if let Some(End::Lost(reason)) = &peer.end {
                return fault(rank, reason.clone());
            }
        }
        for (rank, peer) in peers() {
            if let Some(End::Failed(cause)) = &peer.end {
                return fault(rank, format!("stopped: {cause}"));
            }
        }
        for (rank, peer) in peers() {
            let silent = peer.heard.elapsed();
            if peer.end.is_none() && silent >= self.timeout {
                let seconds = silent.as_secs_f64();
                return fault(
                    rank,
                    format!("has given no sign of life for {seconds:.1} s: it hangs, or cannot be reached"),
                );
            }
        }
        None
    }

    /// [`Shared::take`] of `count` values.
    fn values(&self, from: usize, operation: Operation, number: u64, count: usize) -> Result<Vec<f32>, Error> {
        let part = self.take(from, operation, number)?;
        if part.len() != 4 * count {
            let reason = format!("sent {} bytes in {operation} {number} where {} were due", part.len(), 4 * count);
            return Err(Error::Rank { rank: from, reason });
        }
        Ok(floats(&part))
    }
}

/// What an error of a connection says of the rank at its other end.
fn lost(error: &io::Error) -> End {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
    End::Lost(match error.kind() {
        UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe => {
            "ended without a word: it was killed, or its machine is gone".to_owned()
        }
        WouldBlock | TimedOut => "has taken nothing for too long, and given no sign of life: it hangs".to_owned(),
        _ => format!("cannot be reached: {error}"),
    })
}

/// Where a rank listens, for one that reached the host of rank 0 at `master`: a place without an address is on that host.
fn seen(place: SocketAddr, master: SocketAddr) -> SocketAddr {
    if place.ip().is_unspecified() { SocketAddr::new(master.ip(), place.port()) } else { place }
}

/// How ranks find each other.
struct Rendezvous<'a> {
    launch: &'a Launch,
    /// What they run.
    run: String,
    stop: &'a AtomicBool,
    timeout: Duration,
    deadline: Instant,
}

impl Rendezvous<'_> {
    /// A connection to every other rank, by rank.
    fn meet(&self) -> Result<Vec<Option<TcpStream>>, Error> {
        if self.launch.rank == 0 { self.host() } else { self.join() }
    }

    fn failed(&self, reason: impl Into<String>) -> Error {
        self.launch.failed(reason.into())
    }

    /// # Errors
    /// [`Error::Interrupted`] when nobody is to be waited for any longer.
    fn go_on(&self) -> Result<(), Error> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }

    fn left(&self) -> Duration {
        // No time at all would mean no limit.
        self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
    }

    fn address(&self) -> Result<SocketAddr, Error> {
        let found = (self.launch.master.0.as_str(), self.launch.master.1).to_socket_addrs();
        let found = found.map_err(|error| self.failed(format!("MASTER_ADDR is not found: {error}")))?;
        let mut found: Vec<SocketAddr> = found.collect();
        found.sort_by_key(SocketAddr::is_ipv6);
        found.first().copied().ok_or_else(|| self.failed("MASTER_ADDR has no address"))
    }

    /// Rank 0: waits for all, then tells each where the others listen.
    fn host(&self) -> Result<Vec<Option<TcpStream>>, Error> {
        let master = self.address()?;
        let listener = self.listen(master, master.port())?;
        let met = self.welcome(&listener, 1..self.launch.world);
        let (mut streams, places) = match met {
            Ok(met) => met,
            Err((error, streams)) => {
                for mut stream in streams.into_iter().flatten() {
                    let _ = send_text(&mut stream, &format!("-{error}"));
                }
                return Err(error);
            }
        };
        for (rank, stream) in streams.iter_mut().enumerate() {
            if let Some(stream) = stream {
                send_text(stream, &format!("+{}", places.join("\n")))
                    .map_err(|error| self.failed(format!("rank {rank} left before the start: {error}")))?;
            }
        }
        Ok(streams)
    }

    /// Every other rank: learns from rank 0 where the others listen, connects to those below and waits for those above.
    fn join(&self) -> Result<Vec<Option<TcpStream>>, Error> {
        let (rank, world) = (self.launch.rank, self.launch.world);
        let master = self.address()?;
        let listener = self.listen(master, 0)?;
        let port = listener.local_addr().map_err(|error| self.failed(format!("no port: {error}")))?.port();
        let mut first = self.dial(master, 0, port)?;
        let told = self.told(&mut first)?;
        let places: Vec<SocketAddr> = match told.split_at_checked(1) {
            Some(("+", places)) => {
                places.lines().filter_map(|place| place.parse().ok()).map(|at| seen(at, master)).collect()
            }
            Some(("-", reason)) => return Err(self.failed(format!("rank 0 gave up: {reason}"))),
            Some(("!", reason)) => return Err(self.failed(reason)),
            _ => return Err(self.failed("rank 0 did not answer as this program does")),
        };
        if places.len() != world {
            return Err(self.failed(format!("rank 0 named {} places for {world} ranks", places.len())));
        }
        let mut streams: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        streams[0] = Some(first);
        for below in 1..rank {
            streams[below] = Some(self.dial(places[below], below, port)?);
        }
        let (above, _) = self.welcome(&listener, rank + 1..world).map_err(|(error, _)| error)?;
        for (slot, stream) in streams.iter_mut().zip(above) {
            if stream.is_some() {
                *slot = stream;
            }
        }
        Ok(streams)
    }

    /// A listener: on the loopback interface alone where the master is there, else on all.
    /// On all addresses, where ranks may come from other hosts: the name of a host is often that of its loopback on itself.
    fn listen(&self, master: SocketAddr, port: u16) -> Result<TcpListener, Error> {
        let named = self.launch.master.0.as_str();
        let local = named == "localhost" || named.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let place = match master.ip() {
            ip if local => ip,
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let listener = TcpListener::bind((place, port)).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        listener.map_err(|error| self.failed(format!("cannot listen on port {port}: {error}")))
    }

    /// Connects to `rank` at `place`, where it may not listen yet, and says who is there.
    fn dial(&self, place: SocketAddr, rank: usize, port: u16) -> Result<TcpStream, Error> {
        loop {
            self.go_on()?;
            let error = match TcpStream::connect_timeout(&place, self.left().min(4 * LOOK)) {
                Ok(mut stream) => {
                    let hello = format!("{MAGIC} {} {} {port} {}", self.launch.rank, self.launch.world, self.run);
                    let sent =
                        stream.set_write_timeout(Some(self.timeout)).and_then(|()| send_text(&mut stream, &hello));
                    sent.map_err(|error| self.failed(format!("rank {rank} hung up: {error}")))?;
                    return Ok(stream);
                }
                Err(error) => error,
            };
            if Instant::now() + RETRY >= self.deadline {
                let reason = format!(
                    "rank {rank} did not listen at {place} within {:.0} s: {error}",
                    self.timeout.as_secs_f64()
                );
                return Err(self.failed(reason));
            }
            std::thread::sleep(RETRY);
        }
    }

    /// What rank 0 says when all have come.
    fn told(&self, from: &mut TcpStream) -> Result<String, Error> {
        let mut length = [0; 4];
        self.fill(from, &mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MOST_TEXT {
            return Err(self.failed("rank 0 did not answer as this program does"));
        }
        let mut text = vec![0; length];
        self.fill(from, &mut text)?;
        String::from_utf8(text).map_err(|_| self.failed("rank 0 did not answer as this program does"))
    }

    fn fill(&self, from: &mut TcpStream, mut bytes: &mut [u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            self.go_on()?;
            let read = from.set_read_timeout(Some(self.left().min(LOOK))).and_then(|()| from.read(bytes));
            let error = match read {
                Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                Ok(read) => {
                    bytes = &mut bytes[read..];
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_early(&error) && Instant::now() < self.deadline => continue,
                Err(error) => error,
            };
            return Err(self.failed(format!("rank 0 did not say who is there: {error}")));
        }
        Ok(())
    }

    /// Waits for the ranks `expected`: their connections, and where each of all ranks listens.
    #[allow(clippy::type_complexity)]
    fn welcome(
        &self,
        listener: &TcpListener,
        expected: Range<usize>,
    ) -> Result<(Vec<Option<TcpStream>>, Vec<String>), (Error, Vec<Option<TcpStream>>)> {
        let world = self.launch.world;
        let mut streams: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        // That of rank 0 is known to all.
        let mut places = vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)).to_string(); world];
        let mut guests: Vec<Guest> = Vec::new();
        loop {
            let missing: Vec<String> =
                expected.clone().filter(|rank| streams[*rank].is_none()).map(|rank| rank.to_string()).collect();
            if missing.is_empty() {
                return Ok((streams, places));
            }
            if let Err(error) = self.go_on() {
                return Err((error, streams));
            }
            if Instant::now() >= self.deadline {
                let seconds = self.timeout.as_secs_f64();
                let who = if missing.len() == 1 { "rank" } else { "ranks" };
                let reason = format!("{who} {} did not come within {seconds:.0} s", missing.join(", "));
                return Err((self.failed(reason), streams));
            }
            let came = match listener.accept() {
                Ok((stream, address)) => {
                    match Guest::new(stream, address) {
                        Ok(guest) => guests.push(guest),
                        Err(error) => tracing::warn!("{address} connected and left: {error}"),
                    }
                    true
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
                Err(error) => return Err((self.failed(format!("cannot accept connections: {error}")), streams)),
            };
            // Nobody holds the door for the others.
            let mut silent = Vec::new();
            let mut heard = false;
            for mut guest in guests.drain(..) {
                let Some(hello) = guest.hello() else {
                    silent.push(guest);
                    continue;
                };
                heard = true;
                match self.greeted(guest, hello, &expected) {
                    Ok(Some((rank, stream, place))) if streams[rank].is_none() => {
                        streams[rank] = Some(stream);
                        places[rank] = place;
                    }
                    Ok(Some((rank, ..))) => {
                        return Err((self.failed(format!("two processes say that they are rank {rank}")), streams));
                    }
                    Ok(None) => {}
                    Err(error) => return Err((error, streams)),
                }
            }
            guests = silent;
            if !came && !heard {
                std::thread::sleep(RETRY);
            }
        }
    }

    /// The rank that has connected, and where it listens; none when it is no rank of this run.
    fn greeted(
        &self,
        Guest { mut stream, address, .. }: Guest,
        hello: io::Result<String>,
        expected: &Range<usize>,
    ) -> Result<Option<(usize, TcpStream, String)>, Error> {
        let Some((rank, world, port, run)) = hello.ok().as_deref().and_then(read_hello) else {
            tracing::warn!("{address} connected and is no rank of this version of the program");
            return Ok(None);
        };
        let kept = stream.set_nonblocking(false).and_then(|()| stream.set_write_timeout(Some(self.timeout)));
        if run != self.run {
            let (host, at) = &self.launch.master;
            tracing::warn!("{address} is rank {rank} of another run, {run}, and is told that this is {}", self.run);
            let told = format!(
                "!the ranks of another run meet there: {}, and this is {run}; give one of them another MASTER_PORT than {at} \
                 on {host}",
                self.run
            );
            // One that does not listen has no need to know.
            let _ = kept.and_then(|()| send_text(&mut stream, &told));
            return Ok(None);
        }
        if world != self.launch.world || !expected.contains(&rank) {
            let reason = format!("a process at {address} says that it is rank {rank} of {world}");
            return Err(self.failed(reason));
        }
        kept.map_err(|error| self.failed(format!("rank {rank} hung up: {error}")))?;
        // What came over the loopback is on this host, wherever others reach that.
        let ip = if address.ip().is_loopback() { Ipv4Addr::UNSPECIFIED.into() } else { address.ip() };
        Ok(Some((rank, stream, SocketAddr::new(ip, port).to_string())))
    }
}

/// Rank, number of ranks, port and run of a greeting.
fn read_hello(hello: &str) -> Option<(usize, usize, u16, String)> {
    let mut words = hello.strip_prefix(MAGIC)?.strip_prefix(' ')?.splitn(4, ' ');
    let (rank, world, port) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((rank, world, port, words.next()?.to_owned()))
}

/// Somebody at the door, and what they have said so far.
struct Guest {
    stream: TcpStream,
    address: SocketAddr,
    said: Vec<u8>,
    /// When the whole greeting has to be there.
    until: Instant,
}

impl Guest {
    fn new(stream: TcpStream, address: SocketAddr) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, address, said: Vec::new(), until: Instant::now() + HELLO })
    }

    /// The greeting, once it is whole or will not be; none as long as more may come. Does not wait.
    fn hello(&mut self) -> Option<io::Result<String>> {
        loop {
            let due = match self.said.first_chunk::<4>() {
                Some(length) => 4 + u32::from_le_bytes(*length) as usize,
                None => 4,
            };
            if due > 4 + MOST_HELLO {
                return Some(Err(io::ErrorKind::InvalidData.into()));
            }
            let begin = self.said.len();
            if begin >= 4 && begin == due {
                let text = String::from_utf8(self.said.split_off(4));
                return Some(text.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)));
            }
            self.said.resize(due, 0);
            let read = self.stream.read(&mut self.said[begin..]);
            self.said.truncate(begin + read.as_ref().map_or(0, |read| *read));
            match read {
                Ok(0) => return Some(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_early(&error) && Instant::now() < self.until => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Whether nothing has come yet.
fn is_early(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn send_text(to: &mut TcpStream, text: &str) -> io::Result<()> {
    to.write_all(&(text.len() as u32).to_le_bytes())?;
    to.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn launches(world: usize) -> Vec<Launch> {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        (0..world)
            .map(|rank| {
                let master = ("127.0.0.1".to_owned(), free.port());
                Launch { rank, world, local_rank: rank, master, job: None }
            })
            .collect()
    }

    static GO_ON: AtomicBool = AtomicBool::new(false);

    fn connect(launch: &Launch, timeout: Duration) -> Result<Mesh, Error> {
        Mesh::connect(launch, &Meeting { run: "a run", timeout, stop: &GO_ON })
    }

    /// What `work` gives on each of `world` ranks.
    fn together<T: Send>(world: usize, timeout: Duration, work: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let ranks: Vec<_> = launches(world)
                .into_iter()
                .map(|launch| scope.spawn(move || work(connect(&launch, timeout).unwrap())))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn cut(length: usize, world: usize) -> Vec<Range<usize>> {
        (0..world).map(|rank| length * rank / world..length * (rank + 1) / world).collect()
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_rank_on_the_host_of_the_first_is_found_where_that_was_reached() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(seen(at("0.0.0.0:71"), at("10.0.0.1:29500")), at("10.0.0.1:71"));
        assert_eq!(seen(at("10.0.0.2:71"), at("10.0.0.1:29500")), at("10.0.0.2:71"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]
        #[test]
        fn sums_are_the_trees_and_gathered_values_are_whole(
            world in 1usize..6,
            length in 0usize..3000,
            seed in any::<u64>(),
        ) {
            let values = |rank: usize| -> Vec<f32> {
                let mut rng = crate::rng::Rng::new(seed, rank as u64);
                (0..length).map(|_| rng.normal() as f32).collect()
            };
            let mut tree = Tree::default();
            (0..world).for_each(|rank| tree.push(values(rank)));
            let want = tree.finish().unwrap();
            let pieces = cut(length, world);
            let results = together(world, LONG, |mesh| {
                let rank = mesh.rank();
                // Two under way at once, waited for in the other order.
                let sum = mesh.reduce_scatter(values(rank), &pieces).unwrap();
                let gathered = mesh.all_gather(values(0)[pieces[rank].clone()].to_vec(), &pieces).unwrap();
                let gathered = gathered().unwrap();
                let sum = sum().unwrap();
                let whole = mesh.all_reduce(values(rank), &pieces).unwrap();
                let said = mesh.exchange(&[rank as u8; 3]).unwrap();
                mesh.leave(None);
                (gathered, sum, whole, said, mesh.bytes_sent())
            });
            for (rank, (gathered, sum, whole, said, sent)) in results.into_iter().enumerate() {
                prop_assert_eq!(&gathered, &values(0));
                prop_assert_eq!(&sum, &want[pieces[rank].clone()]);
                prop_assert_eq!(&whole, &want);
                prop_assert_eq!(said, (0..world).map(|rank| vec![rank as u8; 3]).collect::<Vec<_>>());
                let own = pieces[rank].len();
                let payload = 2 * 4 * (length - own) + 2 * 4 * own * (world - 1) + 3 * (world - 1);
                prop_assert_eq!(sent as usize, payload + 5 * HEAD * (world - 1));
            }
        }
    }

    #[test]
    fn ranks_in_rows_and_columns_add_up_like_all_of_them() {
        let values = |rank: usize| -> Vec<f32> { (0..10).map(|n| (n * 37 + rank * 11) as f32 * 0.37).collect() };
        let mut tree = Tree::default();
        (0..4).for_each(|rank| tree.push(values(rank)));
        let want = tree.finish().unwrap();
        let results = together(4, LONG, |mesh| {
            let rank = mesh.rank();
            // Two rows of two neighbours each.
            let row = mesh.among(&[rank / 2 * 2, rank / 2 * 2 + 1]);
            let column = mesh.among(&[rank % 2, rank % 2 + 2]);
            assert_eq!([row.rank(), row.world(), column.rank(), column.world()], [rank % 2, 2, rank / 2, 2]);
            let pieces = cut(10, 2);
            let own = row.reduce_scatter(values(rank), &pieces).unwrap()().unwrap();
            let count = own.len();
            let own = column.all_reduce(own, &cut(count, 2)).unwrap();
            let whole = row.all_gather(own, &pieces).unwrap()().unwrap();
            let said = column.exchange(&[rank as u8]).unwrap();
            mesh.leave(None);
            (whole, said.concat())
        });
        for (rank, (whole, said)) in results.into_iter().enumerate() {
            assert_eq!(whole, want);
            assert_eq!(said, [rank as u8 % 2, rank as u8 % 2 + 2]);
        }
    }

    #[test]
    fn a_relay_goes_from_rank_to_rank_both_ways() {
        let results = together(3, LONG, |mesh| {
            let rank = mesh.rank();
            let gone = [false, true].map(|backwards| {
                let Relay { receive, send } = mesh.relay(2, backwards).unwrap();
                let got = receive().unwrap();
                let next = got.first().map_or(rank as f32, |first| first + 10.0);
                send(vec![next, 0.5]);
                got
            });
            mesh.leave(None);
            gone
        });
        let want = [[vec![], vec![12.0, 0.5]], [vec![0.0, 0.5], vec![2.0, 0.5]], [vec![10.0, 0.5], vec![]]];
        assert_eq!(results, want);
    }

    #[test]
    fn a_rank_that_fails_is_named_to_all() {
        let errors = together(3, LONG, |mesh| {
            if mesh.rank() == 1 {
                mesh.leave(Some("the disk is full"));
                return String::new();
            }
            let error = mesh.barrier().unwrap_err().to_string();
            mesh.leave(Some(&error));
            error
        });
        for error in [&errors[0], &errors[2]] {
            assert!(error.contains("rank 1 stopped: the disk is full"), "{error}");
        }
    }

    #[test]
    fn a_rank_that_does_not_come_is_named_and_one_that_waits_is_not_blamed() {
        let begin = Instant::now();
        let errors = together(3, Duration::from_millis(600), |mesh| {
            if mesh.rank() == 2 {
                // Lives, but does nothing.
                std::thread::sleep(Duration::from_secs(4));
                return String::new();
            }
            let error = mesh.barrier().unwrap_err().to_string();
            // What each has seen itself, not what the other tells it.
            std::thread::sleep(Duration::from_secs(2));
            error
        });
        for error in &errors[..2] {
            assert!(error.contains("rank 2 lives but did not come"), "{error}");
        }
        assert!(begin.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn ranks_that_do_different_things_are_told_so() {
        let errors = together(2, LONG, |mesh| match mesh.rank() {
            0 => mesh.barrier().unwrap_err().to_string(),
            _ => mesh.all_reduce(vec![1.0; 4], &cut(4, 2)).unwrap_err().to_string(),
        });
        // One of them may have left by the time the other looks.
        assert!(errors.iter().any(|error| error.contains("is in")), "{errors:?}");
    }

    #[test]
    fn who_is_missing_at_the_rendezvous_is_named() {
        let mut launches = launches(4);
        launches.truncate(3);
        launches.remove(1);
        let errors: Vec<String> = std::thread::scope(|scope| {
            let ranks: Vec<_> = launches
                .iter()
                .map(|launch| scope.spawn(|| connect(launch, Duration::from_millis(500)).unwrap_err().to_string()))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(errors[0].contains("ranks 1, 3 did not come within"), "{errors:?}");
        assert!(errors[1].contains("rank 2 of 4") && errors[1].contains("rank 0"), "{errors:?}");
    }

    /// A connection to rank 0, as soon as it listens.
    fn knock(launch: &Launch) -> TcpStream {
        loop {
            match TcpStream::connect(("127.0.0.1", launch.master.1)) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }

    #[test]
    fn strangers_are_let_go_and_hold_no_door() {
        let launches = launches(2);
        std::thread::scope(|scope| {
            let host = scope.spawn(|| connect(&launches[0], LONG).unwrap());
            let mut stranger = knock(&launches[0]);
            stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            drop(stranger);
            // One that says nothing, and one that speaks as slowly as it may.
            let _silent = knock(&launches[0]);
            let mut slow = knock(&launches[0]);
            slow.write_all(&[0, 1]).unwrap();
            let begin = Instant::now();
            let guest = connect(&launches[1], LONG).unwrap();
            let host = host.join().unwrap();
            assert!(begin.elapsed() < HELLO, "{:?}", begin.elapsed());
            guest.leave(None);
            host.leave(None);
        });
    }

    #[test]
    fn a_greeting_has_one_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stranger = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, address) = listener.accept().unwrap();
        let mut guest = Guest::new(stream, address).unwrap();
        guest.until = Instant::now() + Duration::from_millis(300);
        stranger.write_all(&[200, 0, 0, 0]).unwrap();
        let begin = Instant::now();
        let error = loop {
            // Always in time for a limit of one read.
            stranger.write_all(b"f").unwrap();
            match guest.hello() {
                Some(hello) => break hello.unwrap_err(),
                None => std::thread::sleep(RETRY),
            }
            assert!(begin.elapsed() < Duration::from_secs(10));
        };
        assert!(is_early(&error), "{error}");
    }

    #[test]
    fn two_runs_at_one_port_are_told_apart() {
        let launches = launches(2);
        let meeting = |run| Meeting { run, timeout: LONG, stop: &GO_ON };
        std::thread::scope(|scope| {
            let host = scope.spawn(|| Mesh::connect(&launches[0], &meeting("/runs/a")).unwrap());
            let other = Mesh::connect(&launches[1], &meeting("/runs/b b")).unwrap_err().to_string();
            assert!(other.contains("/runs/a, and this is /runs/b b"), "{other}");
            let of_job = Launch { job: Some("7.0".to_owned()), ..launches[1].clone() };
            let other = Mesh::connect(&of_job, &meeting("/runs/a")).unwrap_err().to_string();
            assert!(other.contains("this is /runs/a of job 7.0"), "{other}");
            // The run whose rank 0 listens is not disturbed.
            let guest = Mesh::connect(&launches[1], &meeting("/runs/a")).unwrap();
            host.join().unwrap().leave(None);
            guest.leave(None);
        });
    }

    #[test]
    fn nobody_is_waited_for_after_the_stop() {
        let of_three = launches(3);
        let begin = Instant::now();
        let stop = AtomicBool::new(false);
        let meeting = Meeting { run: "a run", timeout: LONG, stop: &stop };
        let of_two = launches(2);
        // One listens, one waits for its word, one finds nobody.
        let errors: Vec<Error> = std::thread::scope(|scope| {
            let ranks: Vec<_> = [&of_three[0], &of_three[1], &of_two[1]]
                .into_iter()
                .map(|launch| scope.spawn(move || Mesh::connect(launch, &meeting).unwrap_err()))
                .collect();
            std::thread::sleep(Duration::from_millis(200));
            stop.store(true, Ordering::Relaxed);
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(begin.elapsed() < LONG / 2, "{:?}", begin.elapsed());
        assert!(matches!(errors[0], Error::Interrupted) && matches!(errors[2], Error::Interrupted), "{errors:?}");
        // It may hear first that rank 0 gave up.
        let second = errors[1].to_string();
        assert!(second.contains("stopped while it waited"), "{second}");
    }

    #[test]
    fn values_gathered_for_one_rank_reach_no_other_and_nothing_is_held_after() {
        let pieces = cut(10, 3);
        let results = together(3, LONG, |mesh| {
            let own = (pieces[mesh.rank()].clone()).map(|n| n as f32).collect();
            let whole = mesh.gather(own, &pieces, 1).unwrap()().unwrap();
            mesh.barrier().unwrap();
            mesh.leave(None);
            (whole, mesh.bytes_sent(), mesh.bytes_held())
        });
        for (rank, (whole, sent, held)) in results.into_iter().enumerate() {
            let want: Vec<f32> = if rank == 1 { (0..10).map(|n| n as f32).collect() } else { Vec::new() };
            assert_eq!(whole, want);
            let parts = if rank == 1 { 0 } else { HEAD + 4 * pieces[rank].len() };
            assert_eq!(sent as usize, parts + 2 * HEAD);
            assert_eq!(held, 0);
        }
    }
}
