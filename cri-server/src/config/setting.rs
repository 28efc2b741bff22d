//! The types a configuration key may have: how each is read from TOML, and how
//! it is written into the file that `berth config default` prints.

use std::fmt;
use std::path::PathBuf;
use toml::de::DeValue;

/// A value of one key.
pub trait Setting: Sized {
    /// What the key wants, for the error message: "a whole number".
    fn wanted() -> String;
    /// The value, or `None` where `value` is not one.
    fn read(value: &DeValue<'_>) -> Option<Self>;
    /// The value in TOML.
    fn write(&self) -> String;
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

impl Setting for String {
    fn wanted() -> String {
        "a string".into()
    }
    fn read(value: &DeValue<'_>) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
    fn write(&self) -> String {
        quoted(self)
    }
}

impl Setting for bool {
    fn wanted() -> String {
        "true or false".into()
    }
    fn read(value: &DeValue<'_>) -> Option<Self> {
        value.as_bool()
    }
    fn write(&self) -> String {
        self.to_string()
    }
}

fn whole_number<T: TryFrom<u64>>(value: &DeValue<'_>) -> Option<T> {
    let integer = value.as_integer()?;
    let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok()?;
    T::try_from(number).ok()
}

impl Setting for u32 {
    fn wanted() -> String {
        format!("a whole number from 0 to {}", u32::MAX)
    }
    fn read(value: &DeValue<'_>) -> Option<Self> {
        whole_number(value)
    }
    fn write(&self) -> String {
        self.to_string()
    }
}

impl Setting for u64 {
    fn wanted() -> String {
        "a whole number, 0 or more".into()
    }
    fn read(value: &DeValue<'_>) -> Option<Self> {
        whole_number(value)
    }
    fn write(&self) -> String {
        self.to_string()
    }
}

/// A path that is absolute, or empty where the key's documentation says what that means.
impl Setting for PathBuf {
    fn wanted() -> String {
        "an absolute path in quotes, or \"\"".into()
    }
    fn read(value: &DeValue<'_>) -> Option<Self> {
        let path = PathBuf::from(value.as_str()?);
        (path.as_os_str().is_empty() || path.is_absolute()).then_some(path)
    }
    fn write(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

/// Longest list on the line of its key; longer ones have lines of their own.
const LONGEST_LIST: usize = 80;

impl<T: Setting> Setting for Vec<T> {
    fn wanted() -> String {
        format!("an array, each item {}", T::wanted())
    }
    fn read(value: &DeValue<'_>) -> Option<Self> {
        value
            .as_array()?
            .iter()
            .map(|item| T::read(item.get_ref()))
            .collect()
    }
    fn write(&self) -> String {
        let items: Vec<_> = self.iter().map(T::write).collect();
        let line = items.join(", ");
        if line.len() <= LONGEST_LIST {
            return format!("[{line}]");
        }
        // Several a line, as TOML allows.
        let mut text = String::from("[");
        for some in items.chunks(6) {
            text.push_str(&format!("\n    {},", some.join(", ")));
        }
        text + "\n]"
    }
}

/// Permission bits of a file, an octal number in quotes: TOML's own `0o660`
/// is easily mistaken for 660.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl Setting for FileMode {
    fn wanted() -> String {
        "an octal mode in quotes, \"0000\" to \"0777\"".into()
    }
    fn read(value: &DeValue<'_>) -> Option<Self> {
        let mode = u32::from_str_radix(value.as_str()?, 8).ok()?;
        (mode <= 0o777).then_some(Self(mode))
    }
    fn write(&self) -> String {
        format!("\"{:04o}\"", self.0)
    }
}

/// A setting that is one of a few words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// The word for it in the configuration.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }

        impl Setting for $name {
            fn wanted() -> String {
                let words = [$(concat!("\"", $word, "\"")),*];
                format!("one of {}", words.join(", "))
            }
            fn read(value: &DeValue<'_>) -> Option<Self> {
                match value.as_str()? {
                    $($word => Some(Self::$variant),)*
                    _ => None,
                }
            }
            fn write(&self) -> String {
                format!("\"{}\"", self.word())
            }
        }
    };
}

words! {
    /// How cgroups are made.
    CgroupDriver {
        /// Found out at start.
        Auto = "auto",
        /// By making directories.
        Cgroupfs = "cgroupfs",
        /// By asking systemd for scopes.
        Systemd = "systemd",
    }
}

words! {
    /// Whether containers get SELinux labels.
    SelinuxChoice {
        /// Where the node has SELinux and its policy knows containers.
        Auto = "auto",
        /// The daemon does not start without.
        On = "on",
        /// Never.
        Off = "off",
    }
}

words! {
    /// Whether a registry is asked when its mirrors fail.
    Fallback {
        /// After them.
        Origin = "origin",
        /// Not at all.
        Never = "never",
    }
}

words! {
    /// What becomes of an image's volumes.
    ImageVolumes {
        /// Directories in the container's own layer.
        Directory = "directory",
        /// Nothing.
        Ignore = "ignore",
    }
}

words! {
    /// What a node without a CNI configuration does.
    DefaultNetwork {
        /// Uses the built-in bridge.
        Builtin = "builtin",
        /// Is not ready.
        Wait = "wait",
    }
}

words! {
    /// Which of a pod's addresses is the first.
    PrimaryFamily {
        /// IPv4, where there is one.
        Ipv4 = "ipv4",
        /// IPv6, where there is one.
        Ipv6 = "ipv6",
        /// The one that the network named first.
        AsGiven = "as-given",
    }
}

words! {
    /// The oldest version of TLS that is spoken.
    TlsVersion {
        Tls12 = "1.2",
        Tls13 = "1.3",
    }
}

words! {
    /// The least a message must weigh to be logged.
    LogLevel {
        Error = "error",
        Warn = "warn",
        Info = "info",
        Debug = "debug",
        Trace = "trace",
    }
}

words! {
    /// How a log line looks.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

words! {
    /// What is done when a container's log cannot be written.
    LogsOnFull {
        /// The container waits.
        Block = "block",
        /// Lines are dropped and counted.
        Drop = "drop",
    }
}

words! {
    /// What a container whose request names no seccomp profile gets.
    UnsetSeccomp {
        /// No filter.
        Unconfined = "unconfined",
        /// Berth's default profile.
        RuntimeDefault = "runtime/default",
    }
}
