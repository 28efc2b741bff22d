//! Whether what is stored of images is what was unpacked.

use super::super::client;
use super::{Finding, Node};
use crate::rpc::chain;
use berth_proto::admin_v1 as admin;

const SUBJECT: &str = "images";

/// What is known to be damaged.
pub fn stored(node: &Node<'_>) -> Vec<Finding> {
    ask(node, false)
}

/// Reads everything.
pub fn verified(node: &Node<'_>) -> Vec<Finding> {
    ask(node, true)
}

fn ask(node: &Node<'_>, read: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (mut whole, mut bytes, mut unknown, mut damaged) = (0, 0, 0, 0);
    let asked = client::block_on(async {
        let mut admin = client::admin(client::connect(node.overrides).await?);
        let request = admin::VerifyImagesRequest { read };
        let mut answers = admin.verify_images(request).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            match answer.verdict.as_str() {
                "whole" => {
                    whole += 1;
                    bytes += answer.bytes;
                }
                "unknown" => unknown += 1,
                _ => {
                    damaged += 1;
                    findings.push(finding(&answer));
                }
            }
        }
        Ok(())
    });
    if let Err(error) = asked {
        // That no daemon answers is said elsewhere.
        if read {
            let error = chain(&*error);
            findings.push(Finding::warning(SUBJECT, error, "start `berth serve`"));
        }
        return findings;
    }
    if read && unknown > 0 {
        findings.push(Finding::warning(
            SUBJECT,
            format!("{unknown} layers have nothing to compare them with"),
            "remove and pull their images to have them checked",
        ));
    }
    if read {
        let mib = bytes >> 20;
        findings.push(Finding::good(
            SUBJECT,
            format!("{whole} layers with {mib} MiB of files are as they were unpacked"),
        ));
    } else if damaged == 0 {
        findings.push(Finding::good(SUBJECT, "no damage is known"));
    }
    findings
}

fn finding(answer: &admin::VerifyImagesResponse) -> Finding {
    let images = match &answer.images[..] {
        [] => String::new(),
        images => format!(" (of {})", images.join(", ")),
    };
    Finding::problem(
        SUBJECT,
        format!("{}{images}: {}", answer.what, answer.why),
        "pull the images that have it: just this is fetched again; running containers still \
         have the damaged files, restart them after that",
    )
}
