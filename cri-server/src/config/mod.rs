//! The daemon's configuration: embedded defaults, then `config.toml`, then
//! `conf.d/*.toml` in the order of their names, then the command line.
//!
//! No file is needed. A key that does not exist is refused, and so is a value of
//! the wrong type, both with file and line: a typing error must not silently
//! mean the default.

mod containers;
mod layout;
mod network;
mod sections;
mod setting;
mod streaming;

pub use layout::{Layout, Overrides, Places};
pub use sections::Config;
pub use setting::{
    CgroupDriver, DefaultNetwork, Fallback, LogFormat, LogLevel, LogsOnFull, PrimaryFamily,
    UnsetSeccomp,
};

use sections::{Handler, Refusal, Section};
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The section whose subsections are runtime handlers.
const HANDLERS: &str = "handlers";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        path: PathBuf,
        line: usize,
        message: String,
    },
    #[error("{}:{line}: there is no section [{name}]{}", path.display(), hint(nearest))]
    UnknownSection {
        path: PathBuf,
        line: usize,
        name: String,
        nearest: Option<String>,
    },
    #[error("{}:{line}: [{section}] has no key {name:?}{}", path.display(), hint(nearest))]
    UnknownKey {
        path: PathBuf,
        line: usize,
        section: String,
        name: String,
        nearest: Option<String>,
    },
    #[error("{}:{line}: {key} must be {wanted}, not {found}", path.display())]
    WrongType {
        path: PathBuf,
        line: usize,
        key: String,
        wanted: String,
        found: String,
    },
    #[error("{key}: {problem}")]
    Value { key: &'static str, problem: String },
}

fn hint(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!("; did you mean {name:?}?"))
        .unwrap_or_default()
}

impl Config {
    /// The defaults changed by every file of `layout`, checked.
    ///
    /// # Errors
    /// The first thing that is wrong in any file.
    pub fn load(layout: &Layout) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        for path in layout.config_files()? {
            let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read {
                path: path.clone(),
                source,
            })?;
            config.apply(&path, &text)?;
        }
        config.check()?;
        Ok(config)
    }

    /// Changes what the file `path` with the content `text` says.
    ///
    /// # Errors
    /// Bad TOML, an unknown key, a value of the wrong type.
    pub fn apply(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let line = |offset: usize| line_of(text, offset);
        let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            line: line(error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
        for (name, content) in table.get_ref() {
            let at = line(name.span().start);
            if name.get_ref() == HANDLERS {
                self.apply_handlers(content, path, text)?;
                continue;
            }
            let Some(section) = self.section_mut(name.get_ref()) else {
                return Err(ConfigError::UnknownSection {
                    path: path.to_owned(),
                    line: at,
                    name: name.get_ref().to_string(),
                    nearest: nearest(name.get_ref(), Config::SECTIONS),
                });
            };
            let DeValue::Table(keys) = content.get_ref() else {
                return Err(ConfigError::WrongType {
                    path: path.to_owned(),
                    line: at,
                    key: name.get_ref().to_string(),
                    wanted: format!("a section: [{}]", name.get_ref()),
                    found: content.get_ref().type_str().to_owned(),
                });
            };
            fill(section, name.get_ref(), keys, path, text)?;
        }
        Ok(())
    }

    /// `[handlers.NAME]`: a section for each.
    fn apply_handlers(
        &mut self,
        content: &Spanned<DeValue<'_>>,
        path: &Path,
        text: &str,
    ) -> Result<(), ConfigError> {
        let wrong = |value: &Spanned<DeValue<'_>>, key: String| ConfigError::WrongType {
            path: path.to_owned(),
            line: line_of(text, value.span().start),
            key,
            wanted: "sections: [handlers.NAME]".into(),
            found: value.get_ref().type_str().to_owned(),
        };
        let DeValue::Table(handlers) = content.get_ref() else {
            return Err(wrong(content, HANDLERS.into()));
        };
        for (name, content) in handlers {
            let section = format!("{HANDLERS}.{}", name.get_ref());
            let DeValue::Table(keys) = content.get_ref() else {
                return Err(wrong(content, section));
            };
            let handler = self.handlers.entry(name.get_ref().to_string());
            fill(handler.or_default(), &section, keys, path, text)?;
        }
        Ok(())
    }

    /// What a type cannot say: ranges, addresses, names.
    fn check(&self) -> Result<(), ConfigError> {
        let refuse = |key, problem: String| Err(ConfigError::Value { key, problem });
        if !self.metrics.address.is_empty() && self.metrics.address.parse::<SocketAddr>().is_err() {
            let problem = format!("{:?} is not ADDRESS:PORT", self.metrics.address);
            return refuse("metrics.address", problem);
        }
        if self.images.scrub_mib_per_second == 0 {
            return refuse("images.scrub_mib_per_second", "must be at least 1".into());
        }
        let images = &self.images;
        for (key, value) in [
            ("images.max_parallel_pulls", images.max_parallel_pulls),
            (
                "images.max_parallel_downloads",
                images.max_parallel_downloads,
            ),
            ("images.max_parallel_layers", images.max_parallel_layers),
        ] {
            if value == 0 {
                return refuse(key, "must be at least 1".into());
            }
        }
        if images.pull_io_weight > 10_000 {
            return refuse("images.pull_io_weight", "must be 0, or 1 to 10000".into());
        }
        if images.pull_cgroup.is_empty() {
            if images.pull_io_weight != 0 {
                let problem = "needs images.pull_cgroup, whose weight it is".into();
                return refuse("images.pull_io_weight", problem);
            }
        } else if let Err(problem) =
            berth_sandbox::cgroup::check_pull_cgroup(&images.pull_cgroup, &self.cgroup.parent)
        {
            return refuse("images.pull_cgroup", problem);
        }
        let bridge = &self.network.bridge;
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        // Source: IFNAMSIZ in linux/if.h, its NUL included.
        if bridge.is_empty()
            || bridge.len() > 15
            || !bridge.bytes().all(plain)
            || bridge == ".."
            || bridge == "."
        {
            let problem = format!(
                "{bridge:?} is not an interface name of 1 to 15 letters, digits, -, _ or ."
            );
            return refuse("network.bridge", problem);
        }
        if self.network.subnets.is_empty() || self.network.subnets.len() > 2 {
            return refuse(
                "network.subnets",
                "must be one subnet, or one of each family".into(),
            );
        }
        let mut families = Vec::new();
        for subnet in &self.network.subnets {
            match family(subnet) {
                Some(family) if !families.contains(&family) => families.push(family),
                Some(_) => {
                    return refuse("network.subnets", format!("{subnet}: two of one family"));
                }
                None => {
                    let problem = format!("{subnet:?} is not a subnet such as 10.88.0.0/16");
                    return refuse("network.subnets", problem);
                }
            }
        }
        for net in &self.network.no_masquerade {
            if net.parse::<berth_netplugin::IpNet>().is_err() {
                let problem = format!("{net:?} is not a network such as 10.88.0.0/16");
                return refuse("network.no_masquerade", problem);
            }
        }
        // Source: RFC 8200, section 5: the kernel turns IPv6 off below.
        if families.contains(&6) && (1..1280).contains(&self.network.mtu) {
            return refuse("network.mtu", "must be 0, or at least 1280 for IPv6".into());
        }
        // Source: RFC 791 (68 bytes is the least IPv4 allows), linux ETH_MAX_MTU.
        if self.network.mtu != 0 && !(68..=65535).contains(&self.network.mtu) {
            return refuse("network.mtu", "must be 0, or 68 to 65535".into());
        }
        if let Some((key, problem)) = self.network.wrong_cni() {
            return refuse(key, problem);
        }
        if let Err((key, problem)) = self.containers.apply(&mut Default::default()) {
            return refuse(key, problem);
        }
        if let Err((key, problem)) = self.streaming.settings() {
            return refuse(key, problem);
        }
        for (name, handler) in &self.handlers {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
            // Source: Kubernetes, RuntimeClass: a handler is a DNS label.
            if berth_sandbox::handler::BUILT_IN.contains(&name.as_str())
                || !name.bytes().all(plain)
                || name.starts_with('.')
                || name.len() > 63
            {
                let problem = format!("{name:?} cannot be the name of a further handler");
                return refuse(HANDLERS, problem);
            }
            let path = &handler.path;
            if !path.as_os_str().is_empty() && !path.is_absolute() {
                let problem = format!("{name}: path is not absolute: {}", path.display());
                return refuse(HANDLERS, problem);
            }
        }
        if self.runtime.nofile_soft > self.runtime.nofile_hard {
            return refuse(
                "runtime.nofile_soft",
                "must not be above nofile_hard".into(),
            );
        }
        if !(256..=1 << 20).contains(&self.runtime.log_line_bytes) {
            return refuse("runtime.log_line_bytes", "must be 256 to 1048576".into());
        }
        if self.cgroup.parent.split('/').any(|part| part == "..") {
            return refuse("cgroup.parent", "must not hold \"..\"".into());
        }
        Ok(())
    }

    /// The configuration as a file, every key with its documentation.
    pub fn to_commented_toml(&self) -> String {
        let mut text = String::from(
            "# Configuration of Berth. Every key is shown with its default; a file needs only\n\
             # what differs. Files in conf.d/*.toml beside this one are read after it, in the\n\
             # order of their names, and change single keys. `berth config check` checks all.\n",
        );
        for name in Config::SECTIONS {
            let Some(section) = self.section(name) else {
                continue;
            };
            text.push('\n');
            for line in section.docs() {
                // Writing to a String does not fail.
                let _ = writeln!(text, "#{line}");
            }
            let _ = writeln!(text, "[{name}]");
            write_keys(&mut text, section, "");
        }
        if self.handlers.is_empty() {
            let example = Handler::default();
            text.push('\n');
            for line in example.docs() {
                let _ = writeln!(text, "#{line}");
            }
            let _ = writeln!(text, "#[{HANDLERS}.NAME]");
            write_keys(&mut text, &example, "#");
        }
        for (name, handler) in &self.handlers {
            let _ = writeln!(text, "\n[{HANDLERS}.{}]", quoted(name));
            write_keys(&mut text, handler, "");
        }
        text
    }

    /// The configuration as JSON, for `crictl info`.
    pub fn to_json(&self) -> serde_json::Value {
        toml::from_str(&self.to_commented_toml()).unwrap_or_default()
    }
}

/// `before` stands before every key.
fn write_keys(text: &mut String, section: &dyn Section, before: &str) {
    for key in section.keys() {
        for line in key.docs {
            let _ = writeln!(text, "#{line}");
        }
        let _ = writeln!(text, "{before}{} = {}", key.name, key.value);
    }
}

/// A key as TOML wants it where it is no bare one.
fn quoted(name: &str) -> String {
    toml::Value::String(name.to_owned()).to_string()
}

/// Sets the keys of one section; `name` is what it is called in errors.
fn fill(
    section: &mut dyn Section,
    name: &str,
    keys: &DeTable<'_>,
    path: &Path,
    text: &str,
) -> Result<(), ConfigError> {
    for (key, value) in keys {
        section
            .set(key.get_ref(), value.get_ref())
            .map_err(|refusal| match refusal {
                Refusal::Unknown => ConfigError::UnknownKey {
                    path: path.to_owned(),
                    line: line_of(text, key.span().start),
                    section: name.to_owned(),
                    name: key.get_ref().to_string(),
                    nearest: nearest(key.get_ref(), section.names()),
                },
                Refusal::WrongType(wanted) => ConfigError::WrongType {
                    path: path.to_owned(),
                    line: line_of(text, value.span().start),
                    key: format!("{name}.{}", key.get_ref()),
                    wanted,
                    found: shown(text.get(value.span()).unwrap_or_default()),
                },
            })?;
    }
    Ok(())
}

/// 4 or 6, for "10.88.0.0/16" and "fd00::/64"; `None` where it is not a subnet.
fn family(subnet: &str) -> Option<u8> {
    let (address, bits) = subnet.split_once('/')?;
    let bits: u8 = bits.parse().ok()?;
    match address.parse().ok()? {
        std::net::IpAddr::V4(_) => (bits <= 30).then_some(4),
        std::net::IpAddr::V6(_) => (bits <= 126).then_some(6),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

/// A value as it stands in the file, short.
fn shown(raw: &str) -> String {
    let mut text: String = raw.chars().take(60).collect();
    if text.len() < raw.len() {
        text.push('…');
    }
    text
}

fn nearest(name: &str, known: &[&str]) -> Option<String> {
    known
        .iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), *candidate))
        // Below this, words have little in common.
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(text: &str) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        config.apply(Path::new("/etc/berth/config.toml"), text)?;
        config.check()?;
        Ok(config)
    }

    fn refusal(text: &str) -> String {
        apply(text).expect_err(text).to_string()
    }

    #[test]
    fn the_printed_default_is_the_default() {
        let text = Config::default().to_commented_toml();
        // Read into something that differs in every key it can.
        let mut config = Config::default();
        config.paths.state = "/elsewhere".into();
        config.grpc.socket_mode = setting::FileMode(0o600);
        config.images.max_parallel_downloads = 1;
        config.network.default = DefaultNetwork::Wait;
        config.network.subnets.clear();
        config.log.level = LogLevel::Trace;
        config.apply(Path::new("default"), &text).unwrap();
        assert_eq!(config, Config::default());
    }

    #[test]
    fn every_key_is_printed_and_documented() {
        let config = Config::default();
        let text = config.to_commented_toml();
        for name in Config::SECTIONS {
            let section = config.section(name).unwrap();
            assert!(!section.docs().is_empty(), "{name}");
            for key in section.keys() {
                assert!(!key.docs.is_empty(), "{name}.{}", key.name);
                assert!(
                    text.contains(&format!("\n{} = {}\n", key.name, key.value)),
                    "{}",
                    key.name
                );
            }
        }
        assert!(
            text.lines().all(|line| line.len() <= 110),
            "lines fit a terminal"
        );
    }

    #[test]
    fn the_default_passes_its_own_checks() {
        Config::default().check().unwrap();
    }

    #[test]
    fn an_unknown_key_is_refused_with_line_and_the_nearest_one() {
        let text = refusal("[network]\nmtu = 1500\nbrigde = \"x\"\n");
        assert_eq!(
            text,
            "/etc/berth/config.toml:3: [network] has no key \"brigde\"; did you mean \"bridge\"?"
        );
    }

    #[test]
    fn an_unknown_section_is_refused_with_the_nearest_one() {
        let text = refusal("\n[netwrok]\n");
        assert!(
            text.contains(":2: there is no section [netwrok]; did you mean \"network\"?"),
            "{text}"
        );
    }

    #[test]
    fn a_key_like_no_other_gets_no_hint() {
        assert!(!refusal("[grpc]\nzzz = 1\n").contains("did you mean"));
    }

    #[test]
    fn a_wrong_type_is_refused_with_line_and_what_is_wanted() {
        assert_eq!(
            refusal("[network]\n\nmtu = \"big\"\n"),
            "/etc/berth/config.toml:3: network.mtu must be a whole number from 0 to 4294967295, not \"big\""
        );
        assert!(refusal("[network]\nmtu = -1\n").contains("not -1"));
        assert!(refusal("[network]\ndefault = \"cilium\"\n").contains("\"builtin\", \"wait\""));
        assert!(refusal("[grpc]\nsocket = \"relative\"\n").contains("absolute path"));
        assert!(refusal("[grpc]\nsocket_mode = \"999\"\n").contains("octal"));
        assert!(refusal("network = 3\n").contains("a section"));
        assert!(refusal("[network]\nsubnets = [1]\n").contains("array"));
    }

    #[test]
    fn bad_toml_is_refused_with_its_line() {
        assert!(refusal("[grpc]\nsocket = \n").starts_with("/etc/berth/config.toml:2: "));
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (text, key) in [
            ("[metrics]\naddress = \"everywhere\"", "metrics.address"),
            (
                "[images]\nmax_parallel_downloads = 0",
                "images.max_parallel_downloads",
            ),
            ("[network]\nbridge = \"a/b\"", "network.bridge"),
            ("[network]\nbridge = \"a234567890123456\"", "network.bridge"),
            ("[network]\nsubnets = []", "network.subnets"),
            ("[network]\nsubnets = [\"10.0.0.0\"]", "network.subnets"),
            (
                "[network]\nsubnets = [\"10.0.0.0/8\", \"11.0.0.0/8\"]",
                "network.subnets",
            ),
            ("[network]\nmtu = 10", "network.mtu"),
            (
                "[network]\nmtu = 1279\nsubnets = [\"fd00::/64\"]",
                "network.mtu",
            ),
            (
                "[network]\nno_masquerade = [\"all\"]",
                "network.no_masquerade",
            ),
            (
                "[runtime]\nnofile_soft = 5\nnofile_hard = 4",
                "runtime.nofile_soft",
            ),
            ("[runtime]\nlog_line_bytes = 1", "runtime.log_line_bytes"),
            ("[network]\ncni_network = \"a b\"", "network.cni_network"),
            (
                "[network]\ncni_handler_dirs = [\"kata=etc\"]",
                "network.cni_handler_dirs",
            ),
            (
                "[network]\ncni_timeout_seconds = 0",
                "network.cni_timeout_seconds",
            ),
            ("[network]\ngc_seconds = 0", "network.gc_seconds"),
            ("[cgroup]\nparent = \"/a/../b\"", "cgroup.parent"),
            ("[streaming]\naddress = \"localhost\"", "streaming.address"),
            ("[streaming]\ntls_key = \"/k\"", "streaming.tls_certificate"),
            (
                "[streaming]\ntls_client_ca = \"/c\"",
                "streaming.tls_client_ca",
            ),
            (
                "[streaming]\nidle_timeout_seconds = 0",
                "streaming.idle_timeout_seconds",
            ),
        ] {
            assert!(refusal(text).starts_with(key), "{text}: {}", refusal(text));
        }
    }

    #[test]
    fn later_files_change_single_keys() {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        std::fs::create_dir_all(etc.join("conf.d")).unwrap();
        std::fs::write(
            etc.join("config.toml"),
            "[network]\nmtu = 1400\nhairpin = false\n",
        )
        .unwrap();
        std::fs::write(etc.join("conf.d/20.toml"), "[network]\nmtu = 9000\n").unwrap();
        std::fs::write(etc.join("conf.d/10.toml"), "[network]\nmtu = 1200\n").unwrap();
        std::fs::write(etc.join("conf.d/30.toml.disabled"), "nonsense").unwrap();
        let overrides = Overrides {
            root: Some(dir.path().into()),
            ..Overrides::default()
        };
        let config = Config::load(&Layout::find(&overrides).unwrap()).unwrap();
        assert_eq!((config.network.mtu, config.network.hairpin), (9000, false));
    }

    #[test]
    fn a_cgroup_for_pulls_is_one_of_its_own_and_a_weight_is_its() {
        let config = apply("[images]\npull_cgroup = \"/pulls\"\npull_io_weight = 10\n").unwrap();
        assert_eq!(config.images.pull_io_weight, 10);
        for (text, wrong) in [
            ("pull_io_weight = 10", "needs images.pull_cgroup"),
            ("pull_cgroup = \"/x\"\npull_io_weight = 10001", "1 to 10000"),
            ("pull_cgroup = \"/berth\"", "cgroup.parent"),
            ("pull_cgroup = \"/a/../b\"", "climbs"),
        ] {
            let error = apply(&format!("[images]\n{text}\n")).unwrap_err();
            assert!(error.to_string().contains(wrong), "{error}");
        }
    }

    #[test]
    fn a_node_without_files_has_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let overrides = Overrides {
            root: Some(dir.path().into()),
            ..Overrides::default()
        };
        assert_eq!(
            Config::load(&Layout::find(&overrides).unwrap()).unwrap(),
            Config::default()
        );
    }

    #[test]
    fn a_file_named_on_the_command_line_must_be_there() {
        let overrides = Overrides {
            config: Some("/nonexistent/berth.toml".into()),
            ..Overrides::default()
        };
        let error = Config::load(&Layout::find(&overrides).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nonexistent/berth.toml");
    }
}
