//! What a cgroup uses: a handful of reads, each absent where the kernel does not count it.

use super::{Cgroup, Error, Version, file};
use std::path::Path;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub cpu: Option<CpuStats>,
    pub memory: Option<MemoryStats>,
    pub swap: Option<SwapStats>,
    pub pids: Option<PidsStats>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// Processor time since the cgroup was made.
    pub usage_ns: u64,
    pub user_ns: u64,
    pub system_ns: u64,
    /// Periods with a quota, and in how many of them it ran out.
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_ns: u64,
}

/// Bytes, and counts of faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    pub usage: u64,
    /// Usage less what the kernel could drop at once: `usage - inactive_file`, as the kubelet
    /// evicts by it.
    pub working_set: u64,
    /// Anonymous memory.
    pub rss: u64,
    pub cache: u64,
    pub mapped_file: u64,
    /// `None`: no limit.
    pub limit: Option<u64>,
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// The most that was ever used; the kernel has it on v1 and from 5.19 on v2.
    pub max_usage: Option<u64>,
    /// How often the limit was hit.
    pub limit_hits: u64,
    /// Memory of the kernel's own on behalf of the cgroup; 0 where it does not say.
    pub kernel: u64,
    /// Faults of the cgroup alone, without those inside it; v2 only tells the sum.
    pub own_page_faults: u64,
    pub own_major_page_faults: u64,
}

impl MemoryStats {
    /// Bytes left up to the limit; `None` without one.
    pub fn available(&self) -> Option<u64> {
        self.limit
            .map(|limit| limit.saturating_sub(self.working_set))
    }
}

/// Bytes of swap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapStats {
    pub usage: u64,
    /// `None`: no limit of its own.
    pub limit: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PidsStats {
    pub current: u64,
    /// `None`: no limit.
    pub limit: Option<u64>,
}

/// Pressure stall information of one resource.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Some process waited.
    pub some: PressureTotals,
    /// All of them did.
    pub full: PressureTotals,
}

/// Source: kernel `Documentation/accounting/psi.rst`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PressureTotals {
    /// Percent of the last 10, 60 and 300 seconds.
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
    /// Microseconds since the cgroup was made.
    pub total_us: u64,
}

/// v1 says "no limit" by the largest multiple of a page in an i64.
const V1_NO_LIMIT: u64 = i64::MAX as u64 - 0xffff;

impl Cgroup {
    /// What it uses now. Parts are `None` where their controller or the cgroup is missing.
    ///
    /// # Errors
    /// A file that is there cannot be read.
    pub fn stats(&self) -> Result<Stats, Error> {
        Ok(Stats {
            cpu: self.cpu_stats()?,
            memory: self.memory_stats()?,
            swap: self.swap_stats()?,
            pids: self.pids_stats()?,
        })
    }

    /// Processor time alone.
    ///
    /// # Errors
    /// A file that is there cannot be read.
    pub fn cpu_stats(&self) -> Result<Option<CpuStats>, Error> {
        match self.version {
            Version::V2 => Ok(self
                .text("cpu", "cpu.stat")?
                .map(|text| parse_cpu_v2(&text))),
            Version::V1 => {
                let Some(usage_ns) = self.number("cpuacct", "cpuacct.usage")? else {
                    return Ok(None);
                };
                let user_ns = self.number("cpuacct", "cpuacct.usage_user")?.unwrap_or(0);
                let system_ns = self.number("cpuacct", "cpuacct.usage_sys")?.unwrap_or(0);
                let text = self.text("cpu", "cpu.stat")?.unwrap_or_default();
                let field = |name| field(&text, name).unwrap_or(0);
                Ok(Some(CpuStats {
                    usage_ns,
                    user_ns,
                    system_ns,
                    periods: field("nr_periods"),
                    throttled_periods: field("nr_throttled"),
                    throttled_ns: field("throttled_time"),
                }))
            }
        }
    }

    /// Memory alone.
    ///
    /// # Errors
    /// A file that is there cannot be read.
    pub fn memory_stats(&self) -> Result<Option<MemoryStats>, Error> {
        let Some(text) = self.text("memory", "memory.stat")? else {
            return Ok(None);
        };
        let field = |name| field(&text, name).unwrap_or(0);
        let stats = match self.version {
            Version::V1 => {
                let usage = self.number("memory", "memory.usage_in_bytes")?.unwrap_or(0);
                MemoryStats {
                    usage,
                    working_set: usage.saturating_sub(field("total_inactive_file")),
                    rss: field("total_rss"),
                    cache: field("total_cache"),
                    mapped_file: field("total_mapped_file"),
                    limit: Some(field("hierarchical_memory_limit"))
                        .filter(|limit| *limit > 0 && *limit < V1_NO_LIMIT),
                    page_faults: field("total_pgfault"),
                    major_page_faults: field("total_pgmajfault"),
                    max_usage: self.number("memory", "memory.max_usage_in_bytes")?,
                    limit_hits: self.number("memory", "memory.failcnt")?.unwrap_or(0),
                    kernel: self
                        .number("memory", "memory.kmem.usage_in_bytes")?
                        .unwrap_or(0),
                    own_page_faults: field("pgfault"),
                    own_major_page_faults: field("pgmajfault"),
                }
            }
            Version::V2 => {
                let usage = self.number("memory", "memory.current")?.unwrap_or(0);
                let events = self.text("memory", "memory.events")?.unwrap_or_default();
                MemoryStats {
                    usage,
                    working_set: usage.saturating_sub(field("inactive_file")),
                    rss: field("anon"),
                    cache: field("file"),
                    mapped_file: field("file_mapped"),
                    limit: self.number("memory", "memory.max")?,
                    page_faults: field("pgfault"),
                    major_page_faults: field("pgmajfault"),
                    max_usage: self.number("memory", "memory.peak")?,
                    limit_hits: self::field(&events, "max").unwrap_or(0),
                    kernel: field("kernel"),
                    own_page_faults: field("pgfault"),
                    own_major_page_faults: field("pgmajfault"),
                }
            }
        };
        Ok(Some(stats))
    }

    /// Bytes of memory in use, without the rest: one read.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn memory_usage(&self) -> Result<Option<u64>, Error> {
        match self.version {
            Version::V1 => self.number("memory", "memory.usage_in_bytes"),
            Version::V2 => self.number("memory", "memory.current"),
        }
    }

    fn swap_stats(&self) -> Result<Option<SwapStats>, Error> {
        match self.version {
            Version::V2 => {
                let Some(usage) = self.number("memory", "memory.swap.current")? else {
                    return Ok(None);
                };
                Ok(Some(SwapStats {
                    usage,
                    limit: self.number("memory", "memory.swap.max")?,
                }))
            }
            Version::V1 => {
                let Some(sum) = self.number("memory", "memory.memsw.usage_in_bytes")? else {
                    return Ok(None);
                };
                let memory = self.number("memory", "memory.usage_in_bytes")?.unwrap_or(0);
                let sum_limit = self.number("memory", "memory.memsw.limit_in_bytes")?;
                let limit = self.number("memory", "memory.limit_in_bytes")?.unwrap_or(0);
                Ok(Some(SwapStats {
                    usage: sum.saturating_sub(memory),
                    limit: sum_limit
                        .filter(|sum| *sum < V1_NO_LIMIT)
                        .map(|sum| sum.saturating_sub(limit)),
                }))
            }
        }
    }

    fn pids_stats(&self) -> Result<Option<PidsStats>, Error> {
        let Some(current) = self.number("pids", "pids.current")? else {
            return Ok(None);
        };
        Ok(Some(PidsStats {
            current,
            limit: self.number("pids", "pids.max")?,
        }))
    }

    /// How often the kernel killed for want of memory in here; `None` where it does not say.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn oom_kills(&self) -> Result<Option<u64>, Error> {
        let Some(path) = self.oom_file() else {
            return Ok(None);
        };
        Ok(file::read_if_there(&path)?.and_then(|text| field(&text, "oom_kill")))
    }

    /// Pressure of "cpu", "memory" or "io"; `None` where the kernel does not measure it. Also
    /// there on a hybrid host.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn pressure(&self, resource: &str) -> Result<Option<Pressure>, Error> {
        let Some(unified) = &self.unified else {
            return Ok(None);
        };
        match file::read_if_there(&unified.join(format!("{resource}.pressure"))) {
            Ok(text) => Ok(text.map(|text| parse_pressure(&text))),
            // Compiled in and switched off (psi=0).
            Err(Error::Read { source, .. })
                if source.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn text(&self, controller: &str, name: &str) -> Result<Option<String>, Error> {
        let Some(directory) = self.directory(controller) else {
            return Ok(None);
        };
        file::read_if_there(&directory.join(Path::new(name)))
    }

    /// `None` also for "max".
    pub(super) fn number(&self, controller: &str, name: &str) -> Result<Option<u64>, Error> {
        Ok(self
            .text(controller, name)?
            .and_then(|text| text.trim().parse().ok()))
    }
}

/// The number behind `name` in a flat keyed file.
pub(super) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

fn parse_cpu_v2(text: &str) -> CpuStats {
    let ns = |name| field(text, name).unwrap_or(0).saturating_mul(1000);
    CpuStats {
        usage_ns: ns("usage_usec"),
        user_ns: ns("user_usec"),
        system_ns: ns("system_usec"),
        periods: field(text, "nr_periods").unwrap_or(0),
        throttled_periods: field(text, "nr_throttled").unwrap_or(0),
        throttled_ns: ns("throttled_usec"),
    }
}

fn parse_pressure(text: &str) -> Pressure {
    let totals = |kind: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(kind))
            .unwrap_or_default();
        let value = |name: &str| {
            line.split_whitespace()
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        };
        let percent = |name| {
            value(name)
                .and_then(|text| text.parse().ok())
                .unwrap_or(0.0)
        };
        PressureTotals {
            avg10: percent("avg10"),
            avg60: percent("avg60"),
            avg300: percent("avg300"),
            total_us: value("total")
                .and_then(|text| text.parse().ok())
                .unwrap_or(0),
        }
    };
    Pressure {
        some: totals("some "),
        full: totals("full "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "oom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "oom_group"), None);
        assert_eq!(field("oom_kill x\n", "oom_kill"), None);
    }

    #[test]
    fn processor_time_is_turned_into_nanoseconds() {
        let stats = parse_cpu_v2("usage_usec 12\nuser_usec 7\nsystem_usec 5\nthrottled_usec 1\n");
        assert_eq!(
            (stats.usage_ns, stats.user_ns, stats.throttled_ns),
            (12_000, 7_000, 1_000)
        );
    }

    #[test]
    fn pressure_is_parsed() {
        let text = "some avg10=1.50 avg60=0.00 avg300=0.25 total=42\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let pressure = parse_pressure(text);
        assert_eq!((pressure.some.avg10, pressure.some.total_us), (1.5, 42));
        assert_eq!(pressure.full.total_us, 7);
        assert_eq!(parse_pressure("rubbish"), Pressure::default());
    }
}
