//! Waiting on a condition, never on the clock.

use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// How much slower than a bare machine this one is, from `BERTH_TEST_SLOW`: an
/// emulated CPU needs a longer deadline, not another test.
pub fn slowness() -> u32 {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    *FACTOR.get_or_init(|| {
        std::env::var("BERTH_TEST_SLOW")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(1)
    })
}

/// What `probe` returns, once it returns something; `None` after `limit`
/// (stretched by [`slowness`]).
pub fn within<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit * slowness();
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        // Between two looks at the condition.
        thread::sleep(Duration::from_millis(10));
    }
}

/// Long enough for anything a test waits for when all is well.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// As [`within`], and the test fails when [`PATIENCE`] is over.
#[track_caller]
pub fn eventually<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    match within(PATIENCE, probe) {
        Some(found) => found,
        None => panic!("after {:?}: {what}", PATIENCE * slowness()),
    }
}
