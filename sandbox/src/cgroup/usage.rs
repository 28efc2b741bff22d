//! What a cgroup uses beside processor and memory: devices, huge pages; and
//! which limits are in force.

use super::stats::field;
use super::{Cgroup, Error, Version, file};
use std::collections::BTreeMap;

/// What was read from and written to one block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    pub major: u32,
    pub minor: u32,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// Operations.
    pub reads: u64,
    pub writes: u64,
}

/// Huge pages of one size, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugepageUsage {
    /// As in the file's name: "2MB".
    pub page_size: String,
    pub usage: u64,
    /// The most there ever was; the kernel says so on v1 only.
    pub max: u64,
}

/// Limits in force; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// As v1 counts them, 2 to 262144.
    pub cpu_shares: u64,
    /// Microseconds.
    pub cpu_period: u64,
    /// Microseconds per period.
    pub cpu_quota: u64,
    /// Bytes.
    pub memory: u64,
    /// What is kept for the cgroup when memory gets short, in bytes.
    pub memory_reservation: u64,
    /// Memory and swap together, in bytes.
    pub memory_and_swap: u64,
}

impl Cgroup {
    /// What went to and from each block device; none where the kernel does not count.
    ///
    /// # Errors
    /// A file that is there cannot be read.
    pub fn io(&self) -> Result<Vec<DeviceIo>, Error> {
        match self.version {
            Version::V2 => Ok(self
                .text("io", "io.stat")?
                .map(|text| parse_io_stat(&text))
                .unwrap_or_default()),
            Version::V1 => {
                let name = |what: &str| format!("blkio.throttle.{what}_recursive");
                let bytes = self.text("blkio", &name("io_service_bytes"))?;
                let counts = self.text("blkio", &name("io_serviced"))?;
                Ok(parse_blkio(
                    bytes.as_deref().unwrap_or_default(),
                    counts.as_deref().unwrap_or_default(),
                ))
            }
        }
    }

    /// Huge pages in use, by size; none without the controller.
    ///
    /// # Errors
    /// A file that is there cannot be read.
    pub fn hugepages(&self) -> Result<Vec<HugepageUsage>, Error> {
        let v1 = self.version == Version::V1 && self.directory("hugetlb").is_some();
        let directory = match (v1, &self.unified) {
            (true, _) => self.directory("hugetlb"),
            (false, Some(unified)) => Some(unified.as_path()),
            (false, None) => None,
        };
        let Some(directory) = directory else {
            return Ok(Vec::new());
        };
        let usage_file = if v1 { "usage_in_bytes" } else { "current" };
        let mut all = Vec::new();
        for page_size in page_sizes() {
            let read = |name: &str| {
                let path = directory.join(format!("hugetlb.{page_size}.{name}"));
                Ok::<_, Error>(
                    file::read_if_there(&path)?.and_then(|text| text.trim().parse::<u64>().ok()),
                )
            };
            let Some(usage) = read(usage_file)? else {
                continue;
            };
            let max = match v1 {
                true => read("max_usage_in_bytes")?.unwrap_or(usage),
                false => usage,
            };
            all.push(HugepageUsage {
                page_size,
                usage,
                max,
            });
        }
        Ok(all)
    }

    /// The limits in force now.
    ///
    /// # Errors
    /// A file that is there cannot be read.
    pub fn limits(&self) -> Result<Limits, Error> {
        // v1 says "no limit" by a number that no machine has.
        let real = |value: Option<u64>| value.filter(|value| *value < 1 << 62).unwrap_or(0);
        match self.version {
            Version::V1 => Ok(Limits {
                cpu_shares: real(self.number("cpu", "cpu.shares")?),
                cpu_period: real(self.number("cpu", "cpu.cfs_period_us")?),
                // -1 is no number of this kind.
                cpu_quota: real(self.number("cpu", "cpu.cfs_quota_us")?),
                memory: real(self.number("memory", "memory.limit_in_bytes")?),
                memory_reservation: real(self.number("memory", "memory.soft_limit_in_bytes")?),
                memory_and_swap: real(self.number("memory", "memory.memsw.limit_in_bytes")?),
            }),
            Version::V2 => {
                let max = self.text("cpu", "cpu.max")?.unwrap_or_default();
                let mut max = max.split_whitespace().map(|word| word.parse().ok());
                let memory = real(self.number("memory", "memory.max")?);
                let swap = self.number("memory", "memory.swap.max")?;
                Ok(Limits {
                    cpu_shares: self
                        .number("cpu", "cpu.weight")?
                        .map_or(0, super::v2::shares),
                    cpu_quota: max.next().flatten().unwrap_or(0),
                    cpu_period: max.next().flatten().unwrap_or(0),
                    memory,
                    memory_reservation: real(self.number("memory", "memory.low")?),
                    memory_and_swap: match swap {
                        Some(swap) if memory > 0 => memory.saturating_add(swap),
                        Some(_) | None => 0,
                    },
                })
            }
        }
    }

    /// How many processes are in it, those of cgroups inside left out; `None` where it is gone.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn process_count(&self) -> Result<Option<u64>, Error> {
        let directory = self.directory("pids").or(self.unified.as_deref());
        let Some(directory) = directory else {
            return Ok(None);
        };
        let text = file::read_if_there(&directory.join("cgroup.procs"))?;
        Ok(text.map(|text| text.lines().count() as u64))
    }

    /// How often the limit of this very cgroup left the kernel no way but to kill; `None`
    /// where it does not say (cgroup v1).
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn limit_ooms(&self) -> Result<Option<u64>, Error> {
        if self.version == Version::V1 {
            return Ok(None);
        }
        let text = self.text("memory", "memory.events.local")?;
        Ok(text.and_then(|text| field(&text, "oom")))
    }
}

/// "2MB", "1GB": sizes the kernel has, as its cgroup files are named.
fn page_sizes() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten();
    let mut sizes: Vec<u64> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let kib = name.to_str()?.strip_prefix("hugepages-")?;
            kib.strip_suffix("kB")?.parse().ok()
        })
        .collect();
    sizes.sort_unstable();
    sizes.into_iter().map(page_size_name).collect()
}

/// Source: hugetlb_cgroup_file_init in mm/hugetlb_cgroup.c, mem_fmt.
fn page_size_name(kib: u64) -> String {
    match kib {
        1_048_576.. => format!("{}GB", kib >> 20),
        1024.. => format!("{}MB", kib >> 10),
        _ => format!("{kib}KB"),
    }
}

fn device(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0". Source: cgroup-v2.rst, io.stat.
fn parse_io_stat(text: &str) -> Vec<DeviceIo> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = device(words.next()?)?;
        let mut io = DeviceIo {
            major,
            minor,
            ..DeviceIo::default()
        };
        for word in words {
            let Some((name, value)) = word.split_once('=') else {
                continue;
            };
            let value = value.parse().unwrap_or(0);
            match name {
                "rbytes" => io.read_bytes = value,
                "wbytes" => io.written_bytes = value,
                "rios" => io.reads = value,
                "wios" => io.writes = value,
                _ => {}
            }
        }
        Some(io)
    };
    text.lines().filter_map(line).collect()
}

/// "8:0 Read 4096" and so on, and a "Total" line that is passed over.
fn parse_blkio(bytes: &str, counts: &str) -> Vec<DeviceIo> {
    let mut devices: BTreeMap<(u32, u32), DeviceIo> = BTreeMap::new();
    for (text, is_bytes) in [(bytes, true), (counts, false)] {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(number), Some(operation), Some(value)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let (Some((major, minor)), Ok(value)) = (device(number), value.parse()) else {
                continue;
            };
            let io = devices.entry((major, minor)).or_insert(DeviceIo {
                major,
                minor,
                ..DeviceIo::default()
            });
            match (operation, is_bytes) {
                ("Read", true) => io.read_bytes = value,
                ("Write", true) => io.written_bytes = value,
                ("Read", false) => io.reads = value,
                ("Write", false) => io.writes = value,
                _ => {}
            }
        }
    }
    devices.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_from_both_versions() {
        let expected = vec![DeviceIo {
            major: 8,
            minor: 16,
            read_bytes: 4096,
            written_bytes: 8192,
            reads: 1,
            writes: 2,
        }];
        let v2 = "8:16 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\nrubbish\n";
        assert_eq!(parse_io_stat(v2), expected);
        let bytes = "8:16 Read 4096\n8:16 Write 8192\n8:16 Sync 1\n8:16 Total 12288\nTotal 12288\n";
        let counts = "8:16 Read 1\n8:16 Write 2\nTotal 3\n";
        assert_eq!(parse_blkio(bytes, counts), expected);
    }

    #[test]
    fn page_sizes_are_named_as_the_kernel_does() {
        let names: Vec<_> = [64, 2048, 1_048_576].map(page_size_name).into();
        assert_eq!(names, ["64KB", "2MB", "1GB"]);
    }
}
