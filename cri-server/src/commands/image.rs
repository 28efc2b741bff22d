//! `berth image`: images through CRI.

use super::{Outcome, client, status::table};
use crate::config::Overrides;
use berth_proto::runtime_v1 as cri;
use clap::Subcommand;
use std::io::Write as _;

#[derive(Subcommand)]
pub enum Command {
    /// Pull an image and print its ID
    Pull {
        /// Such as registry.example/team/app:1.2 or …@sha256:…
        reference: String,
    },
    /// List the images of this node
    #[command(visible_alias = "ls")]
    List,
    /// Remove images with all their names; one that is gone counts as removed
    #[command(visible_alias = "remove")]
    Rm {
        /// References or IDs
        #[arg(required = true)]
        images: Vec<String>,
    },
}

fn spec(image: String) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec {
        image,
        ..Default::default()
    })
}

/// Runs `berth image …`.
pub fn run(command: Command, places: &Overrides) -> Outcome {
    client::block_on(async {
        let mut client = client::images(client::connect(places).await?);
        let mut out = std::io::stdout().lock();
        match command {
            Command::Pull { reference } => {
                let request = cri::PullImageRequest {
                    image: spec(reference),
                    ..Default::default()
                };
                let answer = client
                    .pull_image(request)
                    .await
                    .map_err(client::ClientError::from)?;
                writeln!(out, "{}", answer.into_inner().image_ref)?;
            }
            Command::List => {
                let answer = client
                    .list_images(cri::ListImagesRequest::default())
                    .await
                    .map_err(client::ClientError::from)?;
                write!(out, "{}", list(&answer.into_inner().images))?;
            }
            Command::Rm { images } => {
                for image in images {
                    let request = cri::RemoveImageRequest { image: spec(image) };
                    client
                        .remove_image(request)
                        .await
                        .map_err(client::ClientError::from)?;
                }
            }
        }
        Ok(())
    })
}

/// A line for each name of each image.
fn list(images: &[cri::Image]) -> String {
    let mut rows = vec![["NAME", "ID", "SIZE"].map(str::to_owned)];
    for image in images {
        let id: String = image
            .id
            .trim_start_matches("sha256:")
            .chars()
            .take(13)
            .collect();
        let size = format!("{:.1} MiB", image.size as f64 / f64::from(1 << 20));
        let names = if image.repo_tags.is_empty() {
            &image.repo_digests
        } else {
            &image.repo_tags
        };
        if names.is_empty() {
            rows.push(["<none>".into(), id.clone(), size.clone()]);
        }
        for name in names {
            rows.push([name.clone(), id.clone(), size.clone()]);
        }
    }
    table(&rows)
}
