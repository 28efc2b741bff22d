//! When to ask a registry again: growing pauses with jitter, and what `Retry-After` says.
//!
//! Every wait and every count has a bound, so that a request ends in bounded time whatever the
//! registry answers.
//! Source: RFC 9110, 10.2.3 (`Retry-After`: seconds or a date) and 5.6.7 (dates).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The first pause between attempts, before jitter; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause that is not the registry's wish.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// The longest single Retry-After that is waited for; the kubelet backs off by itself for more.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(20);
/// The same where somebody else may have it at once.
const PATIENCE_BEFORE_THE_NEXT: Duration = Duration::from_secs(1);
/// All pauses of one request together.
const MAX_WAITED: Duration = Duration::from_secs(45);
/// How often the last host that could answer is asked.
const ATTEMPTS: u32 = 5;
/// How often one is asked that has others behind it.
const ATTEMPTS_BEFORE_THE_NEXT: u32 = 2;

/// The pauses of one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retries {
    attempt: u32,
    attempts: u32,
    /// The longest Retry-After that is waited for.
    patience: Duration,
    waited: Duration,
}

impl Retries {
    /// With `is_last`, nobody else can be asked, so it is worth more patience.
    pub fn new(is_last: bool) -> Retries {
        Retries {
            attempt: 1,
            attempts: if is_last {
                ATTEMPTS
            } else {
                ATTEMPTS_BEFORE_THE_NEXT
            },
            patience: if is_last {
                MAX_RETRY_AFTER
            } else {
                PATIENCE_BEFORE_THE_NEXT
            },
            waited: Duration::ZERO,
        }
    }

    /// How long to wait before the next attempt; `None`: not worth it.
    pub fn next(&mut self, retry_after: Option<Duration>) -> Option<Duration> {
        if self.attempt >= self.attempts {
            return None;
        }
        let pause = match retry_after {
            Some(wanted) if wanted > self.patience => return None,
            // Everybody who was told the same would be back at the same moment.
            Some(wanted) => wanted + jitter(wanted / 10),
            None => backoff(self.attempt),
        };
        if self.waited + pause > MAX_WAITED {
            return None;
        }
        self.attempt += 1;
        self.waited += pause;
        Some(pause)
    }
}

/// The pause after the `nth` failure (1 is the first): half of it fixed, half of it chance.
pub(crate) fn backoff(nth: u32) -> Duration {
    let pause = FIRST_PAUSE
        .saturating_mul(1 << (nth.max(1) - 1).min(10))
        .min(MAX_PAUSE);
    pause / 2 + jitter(pause / 2)
}

/// A random part of `most`.
pub(crate) fn jitter(most: Duration) -> Duration {
    let mut bytes = [0u8; 4];
    // Without randomness there is no jitter, which does no harm.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    most.mul_f64(f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX))
}

/// What a `Retry-After` header asks for, counted from `now`; `None` for what is neither seconds
/// nor a date. A date that has passed is no wait.
pub(crate) fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than fit mean: very long.
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX / 2)));
    }
    let at = http_date(text)?;
    Some(at.duration_since(now).unwrap_or_default())
}

/// What the answer's `Retry-After` asks for.
pub(crate) fn retry_after_of(response: &reqwest::Response) -> Option<Duration> {
    let value = response.headers().get(http::header::RETRY_AFTER)?;
    retry_after(value.to_str().ok()?, SystemTime::now())
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, the one form that is still sent.
fn http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (_, rest) = text.split_once(", ")?;
    let mut words = rest.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let month = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let year: u64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<u64>());
    let (hour, minute, second) = (
        clock.next()?.ok()?,
        clock.next()?.ok()?,
        clock.next()?.ok()?,
    );
    let fits = (1970..=9999).contains(&year)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if words.next() != Some("GMT") || words.next().is_some() || !fits {
        return None;
    }
    // Days since 1970 in the Gregorian calendar, years beginning in March.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    // Days from 1 March of year 0 to 1 January 1970.
    let days = days.checked_sub(719_468)?;
    Some(UNIX_EPOCH + Duration::from_secs(days * 86_400 + hour * 3600 + minute * 60 + second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        // 784111777 is the date of RFC 9110's example.
        let date = UNIX_EPOCH + Duration::from_secs(784_111_777);
        let text = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(http_date(text), Some(date));
        let before = date - Duration::from_secs(7);
        assert_eq!(retry_after(text, before), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(text, SystemTime::now()), Some(Duration::ZERO));
        assert_eq!(
            http_date("Thu, 29 Feb 2024 00:00:00 GMT"),
            Some(UNIX_EPOCH + Duration::from_secs(1_709_164_800))
        );
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(UNIX_EPOCH));
        let now = SystemTime::now();
        assert_eq!(retry_after(" 3 ", now), Some(Duration::from_secs(3)));
        assert!(retry_after(&"9".repeat(40), now) > Some(MAX_RETRY_AFTER));
        for bad in [
            "",
            "soon",
            "-1",
            "1.5",
            "Sun, 06 Xxx 1994 08:49:37 GMT",
            "x, 1 Jan 2000 1 GMT",
        ] {
            assert_eq!(retry_after(bad, now), None, "{bad}");
        }
    }

    #[test]
    fn pauses_grow_and_all_of_them_have_a_bound() {
        let mut total = Duration::ZERO;
        for (is_last, attempts) in [(true, ATTEMPTS), (false, ATTEMPTS_BEFORE_THE_NEXT)] {
            let mut retries = Retries::new(is_last);
            let mut count = 1;
            while let Some(pause) = retries.next(None) {
                count += 1;
                total += pause;
            }
            assert_eq!(count, attempts);
        }
        assert!(total < Duration::from_secs(10), "{total:?}");
        assert_eq!(Retries::new(false).next(Some(MAX_RETRY_AFTER)), None);
        let mut retries = Retries::new(true);
        assert_eq!(retries.next(Some(Duration::from_secs(3600))), None);
        let mut waited = Duration::ZERO;
        while let Some(pause) = retries.next(Some(MAX_RETRY_AFTER)) {
            assert!(pause >= MAX_RETRY_AFTER);
            waited += pause;
        }
        assert!(waited <= MAX_WAITED);
        for nth in [0, 1, 5, 40] {
            assert!(backoff(nth) <= MAX_PAUSE);
        }
        assert!(backoff(3) >= FIRST_PAUSE * 2);
    }
}
