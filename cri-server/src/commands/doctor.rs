//! `berth doctor`: what on this node keeps pods from running, or will.
//!
//! A check looks at one thing and says what it found; it changes nothing and
//! needs no daemon, though it may ask one. A new check is a function in the
//! module of its area and a line in [`CHECKS`].

mod cgroups;
mod cni;
mod daemon;
mod images;
mod network;
mod node;
mod registries;
mod security;

use super::Outcome;
use crate::config::{Config, Layout, Overrides, Places};
use serde_json::{Value, json};
use std::io::Write as _;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Good,
    /// Works, but less than it could.
    Warning,
    /// Pods cannot run, or data is at risk. The command fails.
    Problem,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Level::Good => "good",
            Level::Warning => "warning",
            Level::Problem => "problem",
        }
    }
}

/// What a check has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at, in two words.
    pub subject: &'static str,
    /// How it stands.
    pub level: Level,
    /// What was found, a sentence.
    pub found: String,
    /// What to do about it; empty where there is nothing to do.
    pub advice: String,
}

impl Finding {
    /// As it should be.
    pub fn good(subject: &'static str, found: impl Into<String>) -> Finding {
        Finding {
            subject,
            level: Level::Good,
            found: found.into(),
            advice: String::new(),
        }
    }

    /// Works, but less than it could.
    pub fn warning(
        subject: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Finding {
        Finding {
            level: Level::Warning,
            advice: advice.into(),
            ..Finding::good(subject, found)
        }
    }

    /// Has to be mended.
    pub fn problem(
        subject: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Finding {
        Finding {
            level: Level::Problem,
            ..Finding::warning(subject, found, advice)
        }
    }
}

/// What checks look at.
pub struct Node<'a> {
    /// Where the command line says Berth keeps its things.
    pub overrides: &'a Overrides,
    /// The configuration as `berth serve` would read it now.
    pub config: Config,
    /// Where things are by that configuration.
    pub places: Places,
}

/// All checks, in the order they are told.
const CHECKS: &[fn(&Node<'_>) -> Vec<Finding>] = &[
    node::privileges,
    node::kernel,
    node::cgroups,
    cgroups::cgroups,
    cgroups::of_pulls,
    node::limits,
    node::state_directory,
    node::programs,
    security::app_armor,
    security::user_namespaces,
    network::built_in,
    cni::configuration,
    daemon::answers,
    registries::files,
    registries::policy,
    images::stored,
];

/// How `berth doctor` is asked.
#[derive(clap::Args)]
pub struct Options {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Read everything that is stored of images and compare it with what was unpacked; takes as
    /// long as reading it. What is damaged is fetched again with the next pull that needs it
    #[arg(long)]
    verify: bool,
}

/// Runs `berth doctor`. Fails if a problem was found.
pub fn doctor(options: &Options, places: &Overrides) -> Outcome {
    let findings = match look(places) {
        Ok(node) => {
            let mut findings: Vec<_> = CHECKS.iter().flat_map(|check| check(&node)).collect();
            if options.verify {
                findings.extend(images::verified(&node));
            }
            findings
        }
        Err(error) => vec![Finding::problem(
            "configuration",
            crate::rpc::chain(&*error),
            "mend it; `berth config check` tells file and line",
        )],
    };
    let text = if options.json {
        format!("{:#}\n", as_json(&findings))
    } else {
        show(&findings)
    };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    let problems = findings
        .iter()
        .filter(|f| f.level == Level::Problem)
        .count();
    match problems {
        0 => Ok(()),
        1 => Err("one problem was found".into()),
        n => Err(format!("{n} problems were found").into()),
    }
}

fn look(overrides: &Overrides) -> Result<Node<'_>, Box<dyn std::error::Error + Send + Sync>> {
    let layout = Layout::find(overrides)?;
    let config = Config::load(&layout)?;
    let places = layout.places(&config);
    Ok(Node {
        overrides,
        config,
        places,
    })
}

fn show(findings: &[Finding]) -> String {
    let subjects = findings.iter().map(|finding| finding.subject.len());
    let width = subjects.max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let (word, subject) = (finding.level.word(), finding.subject);
        text.push_str(&format!("{word:7}  {subject:width$}  {}\n", finding.found));
        if !finding.advice.is_empty() {
            text.push_str(&format!("{:7}  {:width$}  -> {}\n", "", "", finding.advice));
        }
    }
    text
}

fn as_json(findings: &[Finding]) -> Value {
    let one = |finding: &Finding| {
        json!({
            "subject": finding.subject,
            "level": finding.level.word(),
            "found": finding.found,
            "advice": finding.advice,
        })
    };
    let worst = findings.iter().map(|finding| finding.level).max();
    json!({
        "worst": worst.unwrap_or(Level::Good).word(),
        "findings": findings.iter().map(one).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_shown_with_what_to_do() {
        let findings = [
            Finding::good("kernel", "6.12"),
            Finding::problem("swap", "is on fire", "put it out"),
        ];
        assert_eq!(
            show(&findings),
            "good     kernel  6.12\nproblem  swap    is on fire\n                 -> put it out\n"
        );
        let json = as_json(&findings);
        assert_eq!(json["worst"], "problem");
        assert_eq!(json["findings"][1]["advice"], "put it out");
    }
}
