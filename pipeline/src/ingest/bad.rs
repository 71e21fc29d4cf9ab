//! How many bad records a stage has met, while its tasks read: a limit that was only looked at when a task
//! commits would let one large file of rubbish through to its end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::rows::Reason;

/// Bad records of a stage, those of tasks in flight included.
pub(crate) struct BadRecords {
    limit: u64,
    met: Mutex<Met>,
}

#[derive(Default)]
struct Met {
    /// By reason: how many, and where the first one is.
    by_reason: BTreeMap<Reason, (u64, Option<String>)>,
    /// Whether the records of an earlier process have been added.
    begun: bool,
}

impl Met {
    fn count(&self) -> u64 {
        self.by_reason.values().map(|(n, _)| n).sum()
    }
}

impl BadRecords {
    /// None yet, and at most `limit`.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, met: Mutex::default() })
    }

    /// Add what the stage's journal says from before, once.
    pub fn begin(&self, dropped: &BTreeMap<String, u64>) {
        let mut met = self.lock();
        if std::mem::replace(&mut met.begun, true) {
            return;
        }
        for reason in Reason::ALL.into_iter().filter(|r| r.is_bad()) {
            if let Some(n) = dropped.get(reason.name()) {
                met.by_reason.entry(reason).or_default().0 += n;
            }
        }
    }

    /// The records of one attempt at a task, taken back when it fails.
    pub fn task(self: &Arc<Self>) -> Arc<BadInTask> {
        Arc::new(BadInTask { stage: self.clone(), met: Mutex::default() })
    }

    /// What to say when there are more than the limit: how many of what, and the first of each kind.
    pub fn exceeded(&self) -> Option<String> {
        let met = self.lock();
        if met.count() <= self.limit {
            return None;
        }
        let counts: Vec<String> =
            met.by_reason.iter().filter(|(_, (n, _))| *n > 0).map(|(r, (n, _))| format!("{n} {}", r.name())).collect();
        let mut text =
            format!("{} bad records ({}), more than max_bad_records = {}", met.count(), counts.join(", "), self.limit);
        for first in met.by_reason.values().filter_map(|(_, first)| first.as_ref()) {
            text.push_str("\n  for example ");
            text.push_str(first);
        }
        Some(text)
    }

    // A panic while the lock is held cannot leave the counts half changed.
    fn lock(&self) -> MutexGuard<'_, Met> {
        self.met.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Bad records of one attempt at a task.
pub(crate) struct BadInTask {
    stage: Arc<BadRecords>,
    met: Mutex<BTreeMap<Reason, u64>>,
}

impl BadInTask {
    /// Count a record; false when it is one too many.
    pub fn add(&self, reason: Reason, at: impl FnOnce() -> String) -> bool {
        *self.lock().entry(reason).or_default() += 1;
        let mut met = self.stage.lock();
        let (count, first) = met.by_reason.entry(reason).or_default();
        *count += 1;
        first.get_or_insert_with(at);
        met.count() <= self.stage.limit
    }

    /// The task is done: its records stay counted.
    pub fn keep(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Reason, u64>> {
        self.met.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for BadInTask {
    fn drop(&mut self) {
        let mut met = self.stage.lock();
        for (reason, n) in self.lock().iter() {
            if let Some((count, _)) = met.by_reason.get_mut(reason) {
                *count = count.saturating_sub(*n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_a_failed_attempt_are_taken_back_and_those_of_before_count_once() {
        let stage = BadRecords::new(4);
        let before = BTreeMap::from([("invalid_json".to_string(), 2), ("empty_text".to_string(), 100)]);
        stage.begin(&before);
        stage.begin(&before);
        let failed = stage.task();
        assert!(failed.add(Reason::Truncated, || "a, line 1".into()));
        assert!(failed.add(Reason::Truncated, || "a, line 2".into()));
        assert!(!failed.add(Reason::TooLong, || "a, line 3".into()));
        let text = stage.exceeded().unwrap();
        assert!(text.starts_with("5 bad records (2 truncated, 2 invalid_json, 1 too_long)"), "{text}");
        assert!(text.contains("for example a, line 1") && !text.contains("line 2"), "{text}");
        drop(failed);
        assert_eq!(stage.exceeded(), None);
        let done = stage.task();
        assert!(done.add(Reason::Truncated, String::new) && done.add(Reason::Truncated, String::new));
        done.keep();
        drop(done);
        assert!(!stage.task().add(Reason::Truncated, String::new));
    }
}
