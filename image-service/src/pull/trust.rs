//! Whether the policy accepts an image, before any layer is fetched.

use super::{Described, Job, PullError};
use crate::digest::Digest;
use crate::policy::signature::{self, MAX_PAYLOAD_BYTES};
use crate::policy::{Policy, Signature};
use crate::registry::RegistryError;

impl Job {
    /// The signatures that the policy looked at, to be kept with the image.
    ///
    /// # Errors
    /// [`PullError::Policy`]; [`PullError::Registry`] when a signature cannot be fetched.
    pub async fn check_policy(
        &self,
        described: &Described,
        policy: Policy,
    ) -> Result<Vec<Signature>, PullError> {
        let decision = policy.decision(&self.reference);
        let digests = described.digests();
        let mut signatures = Vec::new();
        if !decision.needs_no_signature() {
            for digest in &digests {
                signatures.extend(self.signatures_of(digest).await?);
            }
        }
        decision
            .check(Some(&self.reference), &digests, &signatures)
            .map_err(|source| PullError::Policy {
                image: self.image(),
                source: Box::new(source),
            })?;
        Ok(signatures)
    }

    /// What is signed for `digest`; nothing when no host has its signatures.
    async fn signatures_of(&self, digest: &Digest) -> Result<Vec<Signature>, PullError> {
        let what = "signatures";
        let tag = &signature::tag_of(digest);
        let found = self
            .first_of(self.registry.resolvers(), what, |turn| async move {
                let limit = crate::content::MAX_DOCUMENT_BYTES;
                let document = self.registry.manifest(turn, tag, limit).await;
                document.map_err(|error| self.registry_error(what, error))
            })
            .await;
        let document = match found {
            Ok(document) => document,
            Err(PullError::Registry { source, .. })
                if matches!(*source, RegistryError::NotFound { .. }) =>
            {
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        let Some(listed) = signature::listed(&document.bytes) else {
            return Ok(Vec::new());
        };
        let mut signatures = Vec::new();
        for one in listed {
            let payload = &one.digest;
            let payload = self
                .first_of(self.registry.pullers(), what, |turn| async move {
                    let registry = &self.registry;
                    let blob = registry.small_blob(turn, payload, MAX_PAYLOAD_BYTES).await;
                    let blob = blob.map_err(|error| self.registry_error(what, error))?;
                    payload.verify(&blob.bytes).map_err(|source| {
                        let host = registry.name(turn.at).to_owned();
                        self.wrong(what, host, source.into())
                    })?;
                    Ok(blob.bytes)
                })
                .await?;
            signatures.extend(Signature::new(payload, one.signature));
        }
        Ok(signatures)
    }
}
