//! How fast a pod may send and receive.
//!
//! "Ingress" is what the pod receives, "egress" what it sends. Rates are bits
//! per second, bursts bits, 0 is no limit: as the CNI capability `bandwidth`
//! has them, whose JSON [`Bandwidth`] is.
//!
//! Source: CNI's CONVENTIONS.md, `bandwidth`; Kubernetes, "Support traffic
//! shaping", the two annotations and their bounds.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The annotation with the limit of what a pod receives.
pub const INGRESS_ANNOTATION: &str = "kubernetes.io/ingress-bandwidth";

/// The annotation with the limit of what a pod sends.
pub const EGRESS_ANNOTATION: &str = "kubernetes.io/egress-bandwidth";

/// Bounds of a rate in bits per second: 1k and 1P. Source: Kubernetes,
/// pkg/util/bandwidth, `minRsrc` and `maxRsrc`.
const RATES: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// What a limit of a tenth of a second's worth is at least, in bits: two of the
/// largest packets that the kernel hands on in one piece (64 KiB).
const LEAST_BURST: u64 = 2 * 8 * (64 << 10);

/// And at most: what plugins can count. Source: the plugin `bandwidth` takes a
/// signed 32 bit number to be safe.
const MOST_BURST: u64 = i32::MAX as u64;

/// Limits of one pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// What the pod may receive. Unit: bits per second, 0 is no limit.
    #[serde(default)]
    pub ingress_rate: u64,
    /// What it may receive at once beyond that. Unit: bits.
    #[serde(default)]
    pub ingress_burst: u64,
    /// What the pod may send. Unit: bits per second, 0 is no limit.
    #[serde(default)]
    pub egress_rate: u64,
    /// What it may send at once beyond that. Unit: bits.
    #[serde(default)]
    pub egress_burst: u64,
}

/// An annotation is no limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the annotation {annotation} is {value:?}: {why}")]
pub struct BadBandwidth {
    /// Its key.
    pub annotation: &'static str,
    /// Its value.
    pub value: String,
    /// What is wrong with it.
    pub why: &'static str,
}

impl Bandwidth {
    /// What a pod's annotations say; `None` where they limit nothing.
    ///
    /// # Errors
    /// The first annotation that is no quantity, or not of 1k to 1P.
    pub fn from_annotations(
        annotations: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, BadBandwidth> {
        let rate = |annotation: &'static str| {
            let Some(value) = annotations.get(annotation) else {
                return Ok(0);
            };
            let bad = |why| BadBandwidth {
                annotation,
                value: value.clone(),
                why,
            };
            let rate = parse_quantity(value)
                .ok_or_else(|| bad("this is no quantity, such as 10M for 10 Mbit/s"))?;
            if rate < *RATES.start() {
                Err(bad("less than 1k, a thousand bits per second, is no limit"))
            } else if rate > *RATES.end() {
                Err(bad("more than 1P is no limit"))
            } else {
                Ok(rate)
            }
        };
        let (ingress, egress) = (rate(INGRESS_ANNOTATION)?, rate(EGRESS_ANNOTATION)?);
        Ok(Some(Self {
            ingress_rate: ingress,
            ingress_burst: burst(ingress),
            egress_rate: egress,
            egress_burst: burst(egress),
        })
        .filter(|limits| !limits.is_none()))
    }

    /// True when nothing is limited.
    pub fn is_none(&self) -> bool {
        self.ingress_rate == 0 && self.egress_rate == 0
    }
}

/// What suits a rate: a tenth of a second's worth, within bounds.
pub(crate) fn burst(rate: u64) -> u64 {
    match rate {
        0 => 0,
        _ => (rate / 10).clamp(LEAST_BURST, MOST_BURST),
    }
}

/// A Kubernetes quantity as a whole number, rounded up; `None` for what is
/// none, is negative, or does not fit.
///
/// Source: Kubernetes, apimachinery, `resource.Quantity`: decimal digits with at
/// most one point, then nothing, a decimal or binary suffix, or an exponent.
pub fn parse_quantity(text: &str) -> Option<u64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || fraction.contains('.') {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let ten = |exponent: i32| {
        let power = |exponent: u32| 10u128.checked_pow(exponent);
        match u32::try_from(exponent) {
            Ok(exponent) => Some((power(exponent)?, 1)),
            Err(_) => Some((1, power(exponent.unsigned_abs())?)),
        }
    };
    let (times, over) = match suffix {
        "" => (1, 1),
        "n" => ten(-9)?,
        "u" => ten(-6)?,
        "m" => ten(-3)?,
        "k" => ten(3)?,
        "M" => ten(6)?,
        "G" => ten(9)?,
        "T" => ten(12)?,
        "P" => ten(15)?,
        "E" => ten(18)?,
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => ten(suffix.strip_prefix(['e', 'E'])?.parse().ok()?)?,
    };
    let over = 10u128
        .checked_pow(u32::try_from(fraction.len()).ok()?)?
        .checked_mul(over)?;
    u64::try_from(digits.checked_mul(times)?.div_ceil(over)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("10M", 10_000_000),
            ("1Gi", 1 << 30),
            ("1.5k", 1_500),
            ("0.5", 1),
            ("1e3", 1_000),
            ("12E2", 1_200),
            ("2E", 2_000_000_000_000_000_000),
            ("1500m", 2),
            ("+7", 7),
            (".5Ki", 512),
            ("0", 0),
        ] {
            assert_eq!(parse_quantity(text), Some(expected), "{text}");
        }
        for bad in [
            "",
            ".",
            "-1",
            "1.2.3",
            "1 M",
            "1Mb",
            "1K",
            "e3",
            "1e",
            "1e99999999999",
            "99E99",
            "M",
            "９",
        ] {
            assert_eq!(parse_quantity(bad), None, "{bad}");
        }
    }

    fn annotations(ingress: Option<&str>, egress: Option<&str>) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for (key, value) in [(INGRESS_ANNOTATION, ingress), (EGRESS_ANNOTATION, egress)] {
            if let Some(value) = value {
                all.insert(key.to_owned(), value.to_owned());
            }
        }
        all
    }

    #[test]
    fn annotations_that_say_nothing_limit_nothing() {
        let all = annotations(None, None);
        assert_eq!(Bandwidth::from_annotations(&all), Ok(None));
    }

    #[test]
    fn one_direction_may_be_limited_alone() {
        let limits = Bandwidth::from_annotations(&annotations(Some("100M"), None));
        let limits = limits.unwrap().unwrap();
        assert_eq!(
            (limits.ingress_rate, limits.ingress_burst),
            (100_000_000, 10_000_000)
        );
        assert_eq!((limits.egress_rate, limits.egress_burst), (0, 0));
        let json = serde_json::to_value(limits).unwrap();
        assert_eq!(json["ingressRate"], 100_000_000);
    }

    #[test]
    fn what_is_no_limit_is_named() {
        for (value, expected) in [
            ("fast", "is no quantity"),
            ("999", "less than 1k"),
            ("2P", "more than 1P"),
        ] {
            let error = Bandwidth::from_annotations(&annotations(None, Some(value))).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains(EGRESS_ANNOTATION) && text.contains(expected),
                "{text}"
            );
        }
    }
}
