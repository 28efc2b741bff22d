//! cgroup limits, both ways.

use super::field::{Field, Quoted, Result};
use super::text;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container_spec::{HugepageLimit, Resources};

/// `None` for 0, which is how CRI says "not given"; negative is refused.
fn positive(field: &Field<'_>, value: i64) -> Result<Option<u64>> {
    match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(field.invalid(format!("{value} is negative"))),
    }
}

/// Like [`positive`], but -1 stands for "no limit".
fn limit_or_none(field: &Field<'_>, value: i64) -> Result<Option<i64>> {
    match value {
        0 => Ok(None),
        -1.. => Ok(Some(value)),
        _ => Err(field.invalid(format!("{value} is negative and not -1"))),
    }
}

/// Limits as asked for.
pub fn resources(field: &Field<'_>, given: &cri::LinuxContainerResources) -> Result<Resources> {
    let cpu_period = positive(&field.at("cpu_period"), given.cpu_period)?;
    // Source: linux/kernel/sched/core.c, 1 ms to 1 s; a quota is at least 1 ms.
    if cpu_period.is_some_and(|period| !(1_000..=1_000_000).contains(&period)) {
        return Err(field
            .at("cpu_period")
            .invalid("must be 1000 to 1000000 microseconds"));
    }
    let cpu_quota = limit_or_none(&field.at("cpu_quota"), given.cpu_quota)?;
    if cpu_quota.is_some_and(|quota| (1..1_000).contains(&quota)) {
        return Err(field
            .at("cpu_quota")
            .invalid("must be at least 1000 microseconds, or -1"));
    }
    let memory = positive(
        &field.at("memory_limit_in_bytes"),
        given.memory_limit_in_bytes,
    )?;
    let swap_field = field.at("memory_swap_limit_in_bytes");
    let swap = limit_or_none(&swap_field, given.memory_swap_limit_in_bytes)?;
    if let (Some(swap @ 1..), Some(_)) = (swap, memory)
        && swap < given.memory_limit_in_bytes
    {
        return Err(
            swap_field.invalid("counts memory and swap together: it is below the memory limit")
        );
    }
    let oom_score_adj = match given.oom_score_adj {
        0 => None,
        // Source: OOM_SCORE_ADJ_MIN and _MAX, linux/oom.h.
        -1000..=1000 => i32::try_from(given.oom_score_adj).ok(),
        _ => return Err(field.at("oom_score_adj").invalid("must be -1000 to 1000")),
    };
    Ok(Resources {
        cpu_period,
        cpu_quota,
        // What the kernel would make of it. Source: MIN_SHARES and MAX_SHARES, kernel/sched.
        cpu_shares: positive(&field.at("cpu_shares"), given.cpu_shares)?
            .map(|shares| shares.clamp(2, 262_144)),
        memory_limit_bytes: memory.map(|_| given.memory_limit_in_bytes),
        memory_swap_limit_bytes: swap,
        oom_score_adj,
        cpuset_cpus: text::cpu_list(&field.at("cpuset_cpus"), &given.cpuset_cpus)?,
        cpuset_mems: text::cpu_list(&field.at("cpuset_mems"), &given.cpuset_mems)?,
        pids_limit: None,
        hugepages: hugepages(&field.at("hugepage_limits"), &given.hugepage_limits)?,
        unified: unified(&field.at("unified"), given)?,
    })
}

fn hugepages(field: &Field<'_>, given: &[cri::HugepageLimit]) -> Result<Vec<HugepageLimit>> {
    let mut limits: Vec<HugepageLimit> = Vec::with_capacity(given.len());
    for (i, limit) in given.iter().enumerate() {
        let item = field.index(i);
        let number = ["KB", "MB", "GB"]
            .iter()
            .find_map(|unit| limit.page_size.strip_suffix(unit));
        let digits =
            |text: &str| (1..=6).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        if !number.is_some_and(digits) {
            let problem = format!("{} is not a size such as 2MB", Quoted(&limit.page_size));
            return Err(item.at("page_size").invalid(problem));
        }
        if limits
            .iter()
            .any(|earlier| earlier.page_size == limit.page_size)
        {
            return Err(item.invalid(format!("{} is limited twice", limit.page_size)));
        }
        limits.push(HugepageLimit {
            page_size: limit.page_size.clone(),
            limit_bytes: limit.limit,
        });
    }
    Ok(limits)
}

/// Files of cgroup v2: `controller.name`, nothing that leads elsewhere.
fn unified(
    field: &Field<'_>,
    given: &cri::LinuxContainerResources,
) -> Result<std::collections::BTreeMap<String, String>> {
    for (name, value) in &given.unified {
        let entry = field.key(name);
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let file = name.split_once('.').is_some_and(|(controller, rest)| {
            !controller.is_empty()
                && !rest.is_empty()
                && name.bytes().all(plain)
                && !name.contains("..")
        });
        // cgroup.procs and its like are not limits.
        if !file || name.starts_with("cgroup.") || name.len() > 100 {
            return Err(entry.invalid("is not a limit of cgroup v2 such as memory.high"));
        }
        if value.is_empty() || value.chars().any(|c| c.is_control() && c != '\n') {
            return Err(entry.invalid(format!("{} is not a value", Quoted(value))));
        }
    }
    Ok(given.unified.clone().into_iter().collect())
}

/// Limits as CRI shows them.
pub fn to_cri(resources: &Resources) -> cri::LinuxContainerResources {
    let signed = |value: Option<u64>| {
        value
            .and_then(|value| i64::try_from(value).ok())
            .unwrap_or(0)
    };
    cri::LinuxContainerResources {
        cpu_period: signed(resources.cpu_period),
        cpu_quota: resources.cpu_quota.unwrap_or(0),
        cpu_shares: signed(resources.cpu_shares),
        memory_limit_in_bytes: resources.memory_limit_bytes.unwrap_or(0),
        oom_score_adj: resources.oom_score_adj.unwrap_or(0).into(),
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepage_limits: resources
            .hugepages
            .iter()
            .map(|limit| cri::HugepageLimit {
                page_size: limit.page_size.clone(),
                limit: limit.limit_bytes,
            })
            .collect(),
        unified: resources.unified.clone().into_iter().collect(),
        memory_swap_limit_in_bytes: resources.memory_swap_limit_bytes.unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELD: Field<'static> = Field::root("r");

    fn refused(given: cri::LinuxContainerResources) -> String {
        resources(&FIELD, &given).expect_err("refused").to_string()
    }

    #[test]
    fn limits_come_back_as_they_went_in() {
        let given = cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: -1,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            oom_score_adj: -997,
            cpuset_cpus: "0-1".into(),
            cpuset_mems: "0".into(),
            hugepage_limits: vec![cri::HugepageLimit {
                page_size: "2MB".into(),
                limit: 0,
            }],
            unified: [("memory.high".to_owned(), "max".to_owned())].into(),
            memory_swap_limit_in_bytes: 64 << 20,
        };
        assert_eq!(to_cri(&resources(&FIELD, &given).unwrap()), given);
    }

    #[test]
    fn nothing_given_is_no_limit() {
        assert_eq!(
            resources(&FIELD, &Default::default()).unwrap(),
            Resources::default()
        );
    }

    #[test]
    fn each_bad_limit_is_refused_by_name() {
        let base = cri::LinuxContainerResources::default;
        for (given, field) in [
            (
                cri::LinuxContainerResources {
                    cpu_period: -1,
                    ..base()
                },
                "r.cpu_period",
            ),
            (
                cri::LinuxContainerResources {
                    cpu_period: 5,
                    ..base()
                },
                "r.cpu_period",
            ),
            (
                cri::LinuxContainerResources {
                    cpu_quota: -2,
                    ..base()
                },
                "r.cpu_quota",
            ),
            (
                cri::LinuxContainerResources {
                    cpu_quota: 10,
                    ..base()
                },
                "r.cpu_quota",
            ),
            (
                cri::LinuxContainerResources {
                    cpu_shares: -5,
                    ..base()
                },
                "r.cpu_shares",
            ),
            (
                cri::LinuxContainerResources {
                    memory_limit_in_bytes: -1,
                    ..base()
                },
                "r.memory_limit_in_bytes",
            ),
            (
                cri::LinuxContainerResources {
                    memory_swap_limit_in_bytes: -2,
                    ..base()
                },
                "r.memory_swap_limit_in_bytes",
            ),
            (
                cri::LinuxContainerResources {
                    memory_limit_in_bytes: 10,
                    memory_swap_limit_in_bytes: 5,
                    ..base()
                },
                "r.memory_swap_limit_in_bytes",
            ),
            (
                cri::LinuxContainerResources {
                    oom_score_adj: 1001,
                    ..base()
                },
                "r.oom_score_adj",
            ),
            (
                cri::LinuxContainerResources {
                    cpuset_cpus: "x".into(),
                    ..base()
                },
                "r.cpuset_cpus",
            ),
            (
                cri::LinuxContainerResources {
                    cpuset_mems: "3-1".into(),
                    ..base()
                },
                "r.cpuset_mems",
            ),
            (
                cri::LinuxContainerResources {
                    hugepage_limits: vec![cri::HugepageLimit {
                        page_size: "../x".into(),
                        limit: 1,
                    }],
                    ..base()
                },
                "r.hugepage_limits[0].page_size",
            ),
            (
                cri::LinuxContainerResources {
                    hugepage_limits: vec![
                        cri::HugepageLimit {
                            page_size: "2MB".into(),
                            limit: 1,
                        },
                        cri::HugepageLimit {
                            page_size: "2MB".into(),
                            limit: 2,
                        },
                    ],
                    ..base()
                },
                "r.hugepage_limits[1]",
            ),
            (
                cri::LinuxContainerResources {
                    unified: [("../x.y".to_owned(), "1".to_owned())].into(),
                    ..base()
                },
                "r.unified[",
            ),
            (
                cri::LinuxContainerResources {
                    unified: [("cgroup.procs".to_owned(), "1".to_owned())].into(),
                    ..base()
                },
                "r.unified[",
            ),
        ] {
            let text = refused(given);
            assert!(text.starts_with(field), "{field}: {text}");
        }
    }
}
