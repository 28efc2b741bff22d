//! systemd as the one who makes cgroups: slices for pods, a transient scope for each container.
//!
//! ```text
//! holder is spawned ─> StartTransientUnit(scope, PIDs=[holder]) ─> limits, devices
//!    ─> the monitor clones init into the scope ─> holder ends
//! the last process ends ─> systemd stops the scope and removes its cgroup
//! ```
//!
//! An empty scope does not live, and init cannot be put into one that does not exist: so a
//! process that does nothing holds the scope while it is limited and entered. It ends with its
//! stdin, which is the daemon's: a killed daemon leaves no scope behind.
//!
//! Limits are told to systemd, so that what it writes at a daemon-reload is the same, and then
//! written by our own hand, which knows more of them. The devices' program is ours alone:
//! systemd takes away only programs of its own.
//!
//! One connection to the system bus is kept. (On its private socket systemd signs answers with a
//! name that is none by the specification, and zbus refuses them.) Nothing waits for a signal of
//! the bus: what was asked for is done when the kernel's files say so.
//!
//! Source: org.freedesktop.systemd1(5), systemd.resource-control(5), systemd.scope(5);
//! systemd's CGROUP_DELEGATION.md.

use super::{Error, file};
use crate::container_spec::Resources;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zbus::Variant;

/// Source: D-Bus specification, "System message bus instances".
const BUS: &str = "/run/dbus/system_bus_socket";

/// How long one call may take. A systemd that starts hundreds of units is slow, not dead.
const ANSWER: Duration = Duration::from_secs(30);

/// How long until the kernel says that a unit is as it was asked for.
const DONE: Duration = Duration::from_secs(30);

/// How often the kernel's files are looked at meanwhile: the first times, and later.
const LOOK_SOON: Duration = Duration::from_micros(500);
const LOOK_LATER: Duration = Duration::from_millis(10);

type Properties<'a> = Vec<(&'a str, Variant<'a>)>;

/// What systemd or the way to it refused.
#[derive(Debug, thiserror::Error)]
#[error("systemd: cannot {what} {unit}")]
pub struct SystemdError {
    what: &'static str,
    unit: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// The kept connection. Calls block and belong on threads that may.
#[derive(Debug, Default)]
pub(super) struct Systemd {
    connection: tokio::sync::Mutex<Option<zbus::Connection>>,
}

/// Whether process 1 is systemd and can be asked: the system bus is there.
pub fn is_there() -> bool {
    // Source: sd_booted(3).
    Path::new("/run/systemd/system").is_dir() && Path::new(BUS).exists()
}

async fn connect() -> zbus::Result<zbus::Connection> {
    zbus::connection::Builder::address(format!("unix:path={BUS}").as_str())
        .method_timeout(ANSWER)
        .build()
        .await
}

impl Systemd {
    /// Calls a method of the manager. Where the connection broke since the last call, once more
    /// over a new one: every method used here may be called twice.
    fn call<B>(
        &self,
        what: &'static str,
        unit: &str,
        method: &'static str,
        body: &B,
    ) -> Result<(), SystemdError>
    where
        B: serde::Serialize + zbus::DynamicType + Sync,
    {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| SystemdError {
            what,
            unit: unit.to_owned(),
            source,
        };
        let runtime = tokio::runtime::Handle::try_current().map_err(|e| failed(e.into()))?;
        let calling = async {
            for last in [false, true] {
                let connection = {
                    let mut kept = self.connection.lock().await;
                    match &*kept {
                        Some(connection) if !connection.is_closed() => connection.clone(),
                        _ => kept.insert(connect().await?).clone(),
                    }
                };
                let answer = connection
                    .call_method(
                        Some("org.freedesktop.systemd1"),
                        "/org/freedesktop/systemd1",
                        Some("org.freedesktop.systemd1.Manager"),
                        method,
                        body,
                    )
                    .await;
                match answer {
                    Ok(_) => return Ok(()),
                    Err(refused @ (zbus::Error::MethodError(..) | zbus::Error::FDO(_))) => {
                        return Err(refused);
                    }
                    Err(broken) if last => return Err(broken),
                    Err(_) => *self.connection.lock().await = None,
                }
            }
            Err(zbus::Error::Failure("no answer".into()))
        };
        runtime.block_on(calling).map_err(|e| failed(e.into()))
    }

    /// Makes the scope `unit` in `slice` around `holder`, with these limits. A dead one of that
    /// name is cleared away first.
    pub fn start_scope(
        &self,
        unit: &str,
        description: &str,
        slice: &str,
        holder: u32,
        resources: &Resources,
    ) -> Result<(), SystemdError> {
        let mut properties: Properties<'_> = vec![
            ("Description", Variant::from(description.to_owned())),
            ("Slice", Variant::from(slice.to_owned())),
            ("PIDs", Variant::from(vec![holder])),
            ("Delegate", Variant::from(true)),
            ("DefaultDependencies", Variant::from(false)),
            (
                "CollectMode",
                Variant::from("inactive-or-failed".to_owned()),
            ),
            ("CPUAccounting", Variant::from(true)),
            ("MemoryAccounting", Variant::from(true)),
            ("IOAccounting", Variant::from(true)),
            ("TasksAccounting", Variant::from(true)),
        ];
        properties.extend(limits(resources, true));
        let start = || self.start_unit(unit, &properties);
        match start() {
            Ok(()) => Ok(()),
            Err(first) => {
                // Left by a start that was cut off; without one this says so and changes nothing.
                let _ = self.call("stop", unit, "StopUnit", &(unit, "replace"));
                let _ = self.call("reset", unit, "ResetFailedUnit", &(unit,));
                start().map_err(|_| first)
            }
        }
    }

    /// Makes a slice, and those it is in.
    pub fn start_slice(&self, unit: &str) -> Result<(), SystemdError> {
        let properties: Properties<'_> = vec![
            ("Description", Variant::from("Berth pods".to_owned())),
            ("DefaultDependencies", Variant::from(false)),
            ("CPUAccounting", Variant::from(true)),
            ("MemoryAccounting", Variant::from(true)),
            ("IOAccounting", Variant::from(true)),
            ("TasksAccounting", Variant::from(true)),
        ];
        self.start_unit(unit, &properties)
    }

    fn start_unit(&self, unit: &str, properties: &Properties<'_>) -> Result<(), SystemdError> {
        let auxiliary: Vec<(&str, Properties<'_>)> = Vec::new();
        self.call(
            "start",
            unit,
            "StartTransientUnit",
            &(unit, "fail", properties, auxiliary),
        )
    }

    /// Starts the slice `unit`, or uses the one that somebody has configured, and gives it the
    /// weight `io_weight`.
    pub fn start_weighted_slice(
        &self,
        unit: &str,
        io_weight: Option<u64>,
    ) -> Result<(), SystemdError> {
        if let Err(first) = self.start_slice(unit) {
            // One with a file of its own, or that runs already, is none that can be made here.
            self.call("start", unit, "StartUnit", &(unit, "replace"))
                .map_err(|_| first)?;
        }
        let mut properties: Properties<'_> = vec![
            ("MemoryAccounting", Variant::from(true)),
            ("IOAccounting", Variant::from(true)),
        ];
        properties.extend(io_weight.map(|weight| ("IOWeight", Variant::U64(weight))));
        self.call(
            "set the weight of",
            unit,
            "SetUnitProperties",
            &(unit, true, properties),
        )
    }

    /// Tells systemd of new limits, so that it does not undo them.
    pub fn set_limits(&self, unit: &str, resources: &Resources) -> Result<(), SystemdError> {
        let properties = limits(resources, false);
        if properties.is_empty() {
            return Ok(());
        }
        self.call(
            "limit",
            unit,
            "SetUnitProperties",
            &(unit, true, properties),
        )
    }

    /// Stops a unit; one that is not loaded counts as stopped.
    pub fn stop(&self, unit: &str) -> Result<(), SystemdError> {
        match self.call("stop", unit, "StopUnit", &(unit, "replace")) {
            Err(error) if error.is_not_loaded() => Ok(()),
            other => other,
        }
    }
}

impl SystemdError {
    fn is_not_loaded(&self) -> bool {
        let text = self.source.to_string();
        text.contains("NoSuchUnit") || text.contains("not loaded")
    }
}

/// As systemd names them. `new`: what is not limited is said, because a scope's defaults have
/// limits of their own (DefaultTasksMax).
///
/// Source: systemd.resource-control(5); bus-common names in org.freedesktop.systemd1(5).
fn limits(resources: &Resources, new: bool) -> Properties<'static> {
    const NONE: u64 = u64::MAX;
    let mut properties: Properties<'static> = Vec::new();
    let mut add = |name, value| properties.push((name, Variant::U64(value)));
    let bytes = |limit: i64| u64::try_from(limit).unwrap_or(NONE);
    if let Some(shares) = resources.cpu_shares.filter(|shares| *shares != 0) {
        add("CPUWeight", super::v2::weight(shares));
    }
    let quota = resources.cpu_quota.filter(|quota| *quota != 0);
    let period = resources.cpu_period.filter(|period| *period != 0);
    if let Some(period) = period {
        add("CPUQuotaPeriodUSec", period);
    }
    match quota {
        Some(quota @ 1..) => {
            let period = u128::from(period.unwrap_or(100_000));
            let per_second = u128::from(quota.unsigned_abs()) * 1_000_000 / period;
            // In steps of 10 ms, as systemd itself rounds when it writes the file.
            let per_second = per_second.div_ceil(10_000) * 10_000;
            add(
                "CPUQuotaPerSecUSec",
                u64::try_from(per_second).unwrap_or(NONE),
            );
        }
        Some(_) => add("CPUQuotaPerSecUSec", NONE),
        None => {}
    }
    let memory = resources.memory_limit_bytes.filter(|limit| *limit != 0);
    if let Some(memory) = memory {
        add("MemoryMax", bytes(memory));
        let swap = resources.memory_swap_limit_bytes.filter(|swap| *swap != 0);
        let alone = match swap {
            Some(..0) => NONE,
            Some(sum) if memory > 0 => bytes((sum - memory).max(0)),
            Some(_) => NONE,
            None if memory < 0 => NONE,
            None => 0,
        };
        add("MemorySwapMax", alone);
    }
    match resources.pids_limit {
        Some(limit @ 1..) => add("TasksMax", limit.unsigned_abs()),
        Some(_) => add("TasksMax", NONE),
        None if new => add("TasksMax", NONE),
        None => {}
    }
    for (name, list) in [
        ("AllowedCPUs", &resources.cpuset_cpus),
        ("AllowedMemoryNodes", &resources.cpuset_mems),
    ] {
        if let Some(bits) = bitmap(list) {
            properties.push((name, Variant::from(bits)));
        }
    }
    properties
}

/// "0-2,8" as bits, lowest first; `None` for an empty list and for what is no list.
fn bitmap(list: &str) -> Option<Vec<u8>> {
    /// More processors than any machine has. Source: NR_CPUS of x86 and ARM, 8192.
    const MOST: usize = 8192;
    let mut bits = Vec::new();
    for range in list.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MOST {
            return None;
        }
        for bit in first..=last {
            if bits.len() <= bit / 8 {
                bits.resize(bit / 8 + 1, 0u8);
            }
            bits[bit / 8] |= 1 << (bit % 8);
        }
    }
    (!bits.is_empty()).then_some(bits)
}

/// Waits until `is` says so.
fn until(what: &str, limit: Duration, is: impl Fn() -> bool) -> Result<(), Error> {
    let begun = Instant::now();
    let mut pause = LOOK_SOON;
    while !is() {
        if begun.elapsed() > limit {
            return Err(Error::NotInTime {
                what: what.to_owned(),
                waited: begun.elapsed(),
            });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LOOK_LATER);
    }
    Ok(())
}

/// Waits until `pid` is in the cgroup `path` of the unified hierarchy.
pub(super) fn until_entered(pid: u32, path: &str) -> Result<(), Error> {
    let own = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let what = format!("{path} to be made by systemd");
    until(&what, DONE, || {
        file::read(&own).is_ok_and(|text| {
            text.lines()
                .filter_map(|line| line.strip_prefix("0::"))
                .any(|now| now == path)
        })
    })
}

/// Waits until a directory is there.
pub(super) fn until_there(directory: &Path) -> Result<(), Error> {
    let what = format!("{} to be made by systemd", directory.display());
    until(&what, DONE, || directory.is_dir())
}

/// Waits until a directory is gone.
pub(super) fn until_gone(directory: &Path, limit: Duration) -> Result<(), Error> {
    let what = format!("{} to be removed by systemd", directory.display());
    until(&what, limit, || !directory.exists())
}

/// The slice that a cgroup parent names: its last part, where that is one.
pub(super) fn slice_of(parent: &str) -> Option<&str> {
    let last = parent.trim_end_matches('/').rsplit('/').next()?;
    let stem = last.strip_suffix(".slice")?;
    let good = !stem.is_empty()
        && last.len() <= 255
        && !stem.starts_with('-')
        && !stem.ends_with('-')
        && !stem.contains("--")
        && stem
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.:@\\".contains(&b));
    good.then_some(last)
}

/// Where systemd puts a slice: "a-b.slice" is in "a.slice". Source: systemd.slice(5).
pub(super) fn path_of_slice(slice: &str) -> String {
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let ends = stem
        .char_indices()
        .filter(|(_, c)| *c == '-')
        .map(|(at, _)| at);
    let mut path = String::new();
    for end in ends.chain([stem.len()]) {
        path.push('/');
        path.push_str(&stem[..end]);
        path.push_str(".slice");
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_where_its_dashes_say() {
        assert_eq!(
            path_of_slice("kubepods-burstable-podX.slice"),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice"
        );
        assert_eq!(path_of_slice("berth.slice"), "/berth.slice");
    }

    #[test]
    fn the_last_part_of_a_parent_is_the_slice() {
        let expanded = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice";
        assert_eq!(slice_of(expanded), Some("kubepods-burstable-pod1_2.slice"));
        assert_eq!(slice_of("a.slice/"), Some("a.slice"));
        for bad in [
            "/kubepods/podX",
            "",
            "/",
            "-.slice",
            ".slice",
            "a--b.slice",
            "a-.slice",
            "a b.slice",
        ] {
            assert_eq!(slice_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn limits_are_said_as_systemd_names_them() {
        let resources = Resources {
            cpu_shares: Some(1024),
            cpu_quota: Some(25_000),
            cpu_period: Some(100_000),
            memory_limit_bytes: Some(64),
            memory_swap_limit_bytes: Some(96),
            cpuset_cpus: "0-1,9".into(),
            ..Resources::default()
        };
        let said = limits(&resources, true);
        let value = |name: &str| {
            said.iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| v.clone())
        };
        assert_eq!(value("CPUWeight"), Some(Variant::U64(100)));
        assert_eq!(value("CPUQuotaPerSecUSec"), Some(Variant::U64(250_000)));
        assert_eq!(value("MemoryMax"), Some(Variant::U64(64)));
        assert_eq!(value("MemorySwapMax"), Some(Variant::U64(32)));
        assert_eq!(value("TasksMax"), Some(Variant::U64(u64::MAX)));
        assert_eq!(value("AllowedCPUs"), Some(Variant::from(vec![3u8, 2])));
        assert!(limits(&Resources::default(), false).is_empty());
    }

    #[test]
    fn lists_of_processors_become_bits() {
        assert_eq!(bitmap("0"), Some(vec![1]));
        assert_eq!(bitmap("7-8"), Some(vec![128, 1]));
        assert_eq!(bitmap(""), None);
        assert_eq!(bitmap("0-99999999"), None);
    }
}
