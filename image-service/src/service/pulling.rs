//! Running pulls: joined by those who want the same with the same credentials, bounded in
//! number, and going on without whoever began them.

use super::{ImageService, Pulled, lock};
use crate::auth::Credentials;
use crate::digest::Digest;
use crate::image::Image;
use crate::policy::{Policy, PolicyError, Signature};
use crate::progress::{Progress, Stage};
use crate::pull::{Job, PullError, own_layer};
use crate::reference::Reference;
use crate::registries_conf;
use crate::registry::{Registries, RegistryError};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;

/// Most signatures that are kept with one image.
const MAX_SIGNATURES: usize = 64;

/// What everybody gets who waits for a pull.
pub(super) type Outcome = Result<Pulled, Arc<PullError>>;

/// Pulls that give the same to everybody who waits for them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The full form.
    reference: Reference,
    /// What was asked for, where that is a short name: it may mean something else than its full
    /// form.
    short: Option<String>,
    // Another's secret must not open an image for those who have none.
    credentials: Option<Credentials>,
}

/// One pull and how to wait for it.
pub(super) struct Running {
    outcome: watch::Receiver<Option<Outcome>>,
    progress: Progress,
}

impl ImageService {
    /// Pulls `reference`, or joins the pull of the same with the same credentials that is
    /// running. The pull goes on when the caller does not wait for it any more.
    ///
    /// # Errors
    /// [`PullError`], shared by all who waited; nothing is listed then that was not before.
    pub async fn pull(
        &self,
        name: &str,
        credentials: Option<Credentials>,
        progress: &Progress,
    ) -> Result<Pulled, Arc<PullError>> {
        let reference: Reference = name
            .parse()
            .map_err(|error| Arc::new(PullError::from(error)))?;
        let image = reference.to_string();
        let key = Key {
            reference,
            short: registries_conf::is_short(name).then(|| name.to_owned()),
            credentials,
        };
        let mut outcome = self.join_or_begin(key, progress);
        match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().expect("waited for it to be there"),
            Err(_) => Err(Arc::new(PullError::Aborted { image })),
        }
    }

    fn join_or_begin(&self, key: Key, progress: &Progress) -> watch::Receiver<Option<Outcome>> {
        let mut running = lock(&self.0.running);
        if let Some(running) = running.get(&key) {
            progress.follow(&running.progress);
            return running.outcome.clone();
        }
        let (sender, outcome) = watch::channel(None);
        running.insert(
            key.clone(),
            Running {
                outcome: outcome.clone(),
                progress: progress.clone(),
            },
        );
        let flight = Flight {
            service: self.clone(),
            key,
            progress: progress.clone(),
        };
        tokio::spawn(async move {
            let result = flight.run().await.map_err(Arc::new);
            if let Err(error) = &result
                && crate::disk::is_full(&**error)
            {
                flight.service.give_back_space().await;
            }
            // Not to be joined any more once its outcome is known.
            drop(flight);
            sender.send_replace(Some(result));
        });
        outcome
    }

    /// The pulls that are running: the reference of each, and how far it is.
    pub fn running_pulls(&self) -> Vec<(String, Progress)> {
        let running = lock(&self.0.running);
        let pulls = running.iter();
        pulls
            .map(|(key, pull)| (key.reference.to_string(), pull.progress.clone()))
            .collect()
    }

    /// How registries are reached, for `berth explain pull`.
    pub fn registries(&self) -> &Arc<Registries> {
        &self.0.registries
    }

    /// Where the policy is, if one is configured; the file need not be there.
    pub fn policy_file(&self) -> Option<&PathBuf> {
        self.0.settings.policy.as_ref()
    }

    /// The policy as it is now. Blocking.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn policy(&self) -> Result<Policy, PolicyError> {
        Policy::load(self.0.settings.policy.as_deref())
    }

    /// Whether the policy of now accepts that `image` is used by somebody who asked for it as
    /// one of `asked`, its ID among them maybe. Signatures are those its pull kept. Blocking.
    ///
    /// What was asked for counts where it names a registry's image; for an ID each of the
    /// image's names does, and one that is accepted is enough.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn check_use(&self, image: &Image, asked: &[&str]) -> Result<(), PolicyError> {
        let policy = self.policy()?;
        if policy.accepts_everything() {
            return Ok(());
        }
        let named = |name: &&str| {
            let found = self.find(name)?;
            let reference: Reference = name.parse().ok()?;
            let by_name = crate::reference::image_id(name).is_none() && found.id == image.id;
            by_name.then_some(reference)
        };
        let mut references: Vec<Reference> = asked.iter().filter_map(named).take(1).collect();
        if references.is_empty() {
            let names = image.repo_tags.iter().chain(&image.repo_digests);
            references = names.filter_map(|name| name.parse().ok()).collect();
        }
        let signatures = self.signatures(image);
        let by_digest: Vec<Reference> = image
            .repo_digests
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        let mut digests: Vec<&Digest> = by_digest.iter().filter_map(Reference::digest).collect();
        digests.push(&image.manifest_digest);
        if references.is_empty() {
            return policy
                .decision_for_nameless()
                .check(None, &digests, &signatures);
        }
        let mut refused = None;
        for reference in &references {
            let decision = policy.decision(reference);
            match decision.check(Some(reference), &digests, &signatures) {
                Ok(()) => return Ok(()),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        refused.map_or(Ok(()), Err)
    }

    fn signatures(&self, image: &Image) -> Vec<Signature> {
        let images = self.0.images.load();
        let record = images.by_id.get(&image.id);
        record.map_or_else(Vec::new, |(record, _)| record.signatures.clone())
    }
}

/// Adds to `new` what is not there yet, within a bound; newer ones first.
pub(super) fn keep_signatures(new: &mut Vec<Signature>, old: &[Signature]) {
    for signature in old {
        if !new.contains(signature) {
            new.push(signature.clone());
        }
    }
    new.truncate(MAX_SIGNATURES);
}

/// A running pull; dropping it ends its being joined.
struct Flight {
    service: ImageService,
    key: Key,
    progress: Progress,
}

impl Drop for Flight {
    fn drop(&mut self) {
        lock(&self.service.0.running).remove(&self.key);
        self.progress.enter(Stage::Done);
    }
}

impl Flight {
    async fn run(&self) -> Result<Pulled, PullError> {
        let service = &self.service.0;
        let _permit = service.pull_permits.acquire().await;
        let Some(short) = &self.key.short else {
            return self.pull(self.key.reference.clone()).await;
        };
        let image = self.key.reference.to_string();
        let references = service
            .registries
            .references(short)
            .await
            .map_err(|error| PullError::from_registry("name", &image, error))?;
        let last = references.len() - 1;
        for (nth, reference) in references.into_iter().enumerate() {
            match self.pull(reference).await {
                // The next of the registries that are searched may have it.
                Err(PullError::Registry { source, .. })
                    if nth < last && may_be_elsewhere(&source) =>
                {
                    tracing::info!(error = %source, "trying the next registry");
                }
                outcome => return outcome,
            }
        }
        Err(PullError::Aborted { image })
    }

    async fn pull(&self, reference: Reference) -> Result<Pulled, PullError> {
        let service = &self.service.0;
        let image = reference.to_string();
        let registry = service
            .registries
            .open(&reference, self.key.credentials.clone())
            .await
            .map_err(|error| PullError::from_registry("manifest", &image, error))?;
        let job = Arc::new(Job {
            shared: Arc::clone(&service.pulls),
            reference: reference.clone(),
            registry: Arc::new(registry),
            content: Arc::clone(&service.content),
            layers: service.layers.clone(),
            machine: service.machine.clone(),
            max_layer_downloads: service.settings.max_layer_downloads,
            own_permit: own_layer(),
            max_layer_bytes: service.settings.max_layer_bytes,
            progress: self.progress.clone(),
        });
        let described = job.describe().await?;
        let signatures = job
            .check_policy(&described, self.policy(&image).await?)
            .await?;
        let mut fetched = job.fetch(described).await?;
        fetched.record.signatures = signatures;
        if reference != self.key.reference {
            fetched
                .record
                .found_as
                .extend(self.key.reference.repo_tag());
        }
        let image_id = fetched.record.id.to_string();
        self.progress.enter(Stage::Record);
        let service = self.service.clone();
        // The layers' lease ends with `fetched`, after the record names them.
        let committed = tokio::task::spawn_blocking(move || {
            let documents = &fetched.documents;
            service.commit(fetched.record.clone(), documents)
        });
        committed
            .await
            .map_err(|_| PullError::Aborted {
                image: image.clone(),
            })?
            .map_err(|error| error.of(image))?;
        Ok(Pulled {
            image_id,
            bytes: self.progress.bytes(),
        })
    }

    async fn policy(&self, image: &str) -> Result<Policy, PullError> {
        let service = self.service.clone();
        tokio::task::spawn_blocking(move || service.policy())
            .await
            .map_err(|_| PullError::Aborted {
                image: image.into(),
            })?
            .map_err(|error| PullError::Policy {
                image: image.into(),
                source: Box::new(error),
            })
    }
}

fn may_be_elsewhere(error: &RegistryError) -> bool {
    matches!(
        error,
        RegistryError::NotFound { .. }
            | RegistryError::Unauthorized { .. }
            | RegistryError::Denied { .. }
            | RegistryError::Unreachable { .. }
            | RegistryError::Tls { .. }
    )
}
