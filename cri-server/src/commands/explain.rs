//! `berth explain`: why the daemon does what it does.

use super::{Outcome, client};
use crate::admin::explain::to_proto;
use crate::config::{Config, Layout, Overrides};
use crate::serve::image_settings;
use berth_image_service::explain;
use berth_image_service::policy::Policy;
use berth_image_service::registry::Registries;
use berth_image_service::service::registry_files;
use berth_proto::admin_v1 as admin;
use clap::Subcommand;
use std::io::Write as _;

#[derive(Subcommand)]
pub enum Command {
    /// Show what a pull would do, without pulling
    ///
    /// Each host it would ask, in order: by which file, with which CA, proxy and credentials, and
    /// what it answers to a request for the manifest's head. The daemon is asked, as its
    /// environment and what it remembers of hosts count; where none answers, this program looks
    /// itself.
    Pull {
        /// As in a pod: registry.example/team/app:1.2, busybox
        image: String,
    },
}

/// Runs `berth explain …`.
pub fn run(command: Command, places: &Overrides) -> Outcome {
    let Command::Pull { image } = command;
    client::block_on(async {
        let answer = match client::connect(places).await {
            Ok(channel) => {
                let request = admin::ExplainPullRequest {
                    image: image.clone(),
                };
                let answer = client::admin(channel).explain_pull(request).await;
                answer.map_err(client::ClientError::from)?.into_inner()
            }
            Err(_) => {
                eprintln!("no daemon answers; this is what one would do that is started here, now");
                without_daemon(&image, places).await?
            }
        };
        let refused = answer
            .references
            .iter()
            .any(|reference| !reference.problem.is_empty());
        write!(std::io::stdout().lock(), "{}", show(&image, &answer))?;
        if refused {
            return Err("it cannot be pulled".into());
        }
        Ok(())
    })
}

async fn without_daemon(
    image: &str,
    places: &Overrides,
) -> Result<admin::ExplainPullResponse, Box<dyn std::error::Error + Send + Sync>> {
    let layout = Layout::find(places)?;
    let config = Config::load(&layout)?;
    let settings = image_settings(&config, &layout.places(&config));
    let registries = Registries::new(registry_files(&settings), settings.timeouts);
    let policy = Policy::load(settings.policy.as_deref());
    Ok(to_proto(
        explain::explain(&registries, policy, image, None).await,
    ))
}

fn show(image: &str, answer: &admin::ExplainPullResponse) -> String {
    let mut text = String::new();
    for reference in &answer.references {
        let because = match reference.because.as_str() {
            "" => String::new(),
            because => format!(" ({because})"),
        };
        text.push_str(&format!("{image} is {}{because}\n", reference.reference));
        if !reference.policy.is_empty() {
            text.push_str(&format!("  policy       {}\n", reference.policy));
        }
        if !reference.problem.is_empty() {
            text.push_str(&format!("  problem      {}\n", reference.problem));
        }
        for (nth, host) in reference.hosts.iter().enumerate() {
            text.push_str(&format!("{}. {}\n", nth + 1, host.url));
            for (name, value) in [
                ("from", &host.said_by),
                ("may", &host.capabilities),
                ("tls", &host.tls),
                ("proxy", &host.proxy),
                ("credentials", &host.credentials),
                ("aside", &host.aside),
                ("answer", &host.answer),
            ] {
                if !value.is_empty() {
                    text.push_str(&format!("  {name:<12} {value}\n"));
                }
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_is_shown_in_order() {
        let host = |url: &str, answer: &str| admin::HostExplanation {
            url: url.into(),
            proxy: "none".into(),
            answer: answer.into(),
            ..Default::default()
        };
        let answer = admin::ExplainPullResponse {
            references: vec![admin::PullExplanation {
                reference: "q.io/a:1".into(),
                because: "alias of /c".into(),
                policy: "accept".into(),
                hosts: vec![
                    host("https://m/v2/a", "not found"),
                    host("https://q.io/v2/a", "has it"),
                ],
                ..Default::default()
            }],
        };
        assert_eq!(
            show("a:1", &answer),
            "a:1 is q.io/a:1 (alias of /c)\n  policy       accept\n\
             1. https://m/v2/a\n  proxy        none\n  answer       not found\n\
             2. https://q.io/v2/a\n  proxy        none\n  answer       has it\n"
        );
    }
}
