//! `berth image`: images through CRI, and what CRI has no words for.

mod archive;
mod pull;

use super::{Outcome, client, status::table};
use crate::config::Overrides;
use berth_proto::admin_v1 as admin;
use berth_proto::runtime_v1 as cri;
use clap::Subcommand;
use std::io::Write as _;
use std::path::PathBuf;

#[derive(Subcommand)]
pub enum Command {
    /// Pull an image and print its ID
    ///
    /// Shows how far each layer is: bars on a terminal, lines elsewhere, on standard error.
    Pull {
        /// Such as registry.example/team/app:1.2 or …@sha256:…
        reference: String,
    },
    /// List the images of this node
    #[command(visible_alias = "ls")]
    List,
    /// Remove images with all their names; one that is gone counts as removed
    #[command(visible_alias = "rm")]
    Remove {
        /// References or IDs
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove images that no container has and no tag names, and what broken pulls left
    Prune {
        /// Those with a tag as well
        #[arg(long)]
        all: bool,
    },
    /// Import images from an archive or an OCI layout
    ///
    /// Takes an OCI layout (a directory or a tar archive of one) and what `docker save` writes,
    /// plain, gzip or zstd, with one image or several. Prints ID and names of each.
    Import {
        /// A file, a directory, or - for standard input
        source: PathBuf,
        /// Name the image so; only for an archive of one image
        #[arg(long)]
        name: Option<String>,
    },
    /// Export images into an OCI archive, which `docker load` takes, too
    Export {
        /// References or IDs
        #[arg(required = true)]
        images: Vec<String>,
        /// The file to write; - is standard output
        #[arg(long, short, default_value = "-")]
        output: PathBuf,
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
        let channel = client::connect(places).await?;
        let mut client = client::images(channel.clone());
        let mut out = std::io::stdout().lock();
        match command {
            Command::Pull { reference } => {
                drop(out);
                return pull::pull(channel, reference).await;
            }
            Command::Import { source, name } => {
                drop(out);
                return archive::import(channel, source, name).await;
            }
            Command::Export { images, output } => {
                drop(out);
                return archive::export(channel, images, output).await;
            }
            Command::Prune { all } => {
                let answer = client::admin(channel)
                    .prune_images(admin::PruneImagesRequest { all })
                    .await
                    .map_err(client::ClientError::from)?
                    .into_inner();
                for image in &answer.images {
                    writeln!(out, "{image}")?;
                }
                let mib = answer.bytes as f64 / f64::from(1 << 20);
                writeln!(out, "{} images, {mib:.1} MiB", answer.images.len())?;
            }
            Command::List => {
                let answer = client
                    .list_images(cri::ListImagesRequest::default())
                    .await
                    .map_err(client::ClientError::from)?;
                write!(out, "{}", list(&answer.into_inner().images))?;
            }
            Command::Remove { images } => {
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
