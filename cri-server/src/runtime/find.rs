//! IDs of requests: whole, or the beginning of exactly one.

use crate::convert::{Field, Refused, text};
use berth_sandbox::container::ContainerRecord;
use berth_sandbox::pod::PodRecord;
use berth_sandbox::view::View;
use std::sync::Arc;
use tonic::Status;

/// Digits in a whole ID.
const WHOLE: usize = 64;

fn resolve<'a>(
    field: &Field<'_>,
    text: &str,
    ids: impl Iterator<Item = &'a str>,
) -> Result<String, Refused> {
    let text = text::id(field, text)?;
    if text.len() == WHOLE {
        return Ok(text.to_owned());
    }
    let mut matching = ids.filter(|id| id.starts_with(text));
    match (matching.next(), matching.next()) {
        (Some(one), None) => Ok(one.to_owned()),
        (Some(_), Some(_)) => Err(field.invalid(format!("{text} is the beginning of several IDs"))),
        // Nothing has it: what that means is up to the call.
        (None, _) => Ok(text.to_owned()),
    }
}

/// The whole ID of the pod that `text` means; `text` again where there is none.
///
/// # Errors
/// It is no ID, or the beginning of several.
pub fn pod(view: &View, text: &str) -> Result<String, Refused> {
    let ids = view
        .pods()
        .filter(|pod| pod.state.is_listed())
        .map(|pod| pod.id.as_str());
    resolve(&Field::root("pod_sandbox_id"), text, ids)
}

/// The whole ID of the container that `text` means; `text` again where there is none.
///
/// # Errors
/// It is no ID, or the beginning of several.
pub fn container(view: &View, text: &str) -> Result<String, Refused> {
    let ids = view
        .containers()
        .filter(|c| c.state.is_listed())
        .map(|c| c.id.as_str());
    resolve(&Field::root("container_id"), text, ids)
}

/// The pod that `text` means.
///
/// # Errors
/// NOT_FOUND, and those of [`pod`].
pub fn pod_record(view: &View, text: &str) -> Result<Arc<PodRecord>, Status> {
    let id = pod(view, text)?;
    let listed = view.pod(&id).filter(|pod| pod.state.is_listed());
    listed
        .cloned()
        .ok_or_else(|| Status::not_found(format!("no pod sandbox {id}")))
}

/// The container that `text` means.
///
/// # Errors
/// NOT_FOUND, and those of [`container`].
pub fn container_record(view: &View, text: &str) -> Result<Arc<ContainerRecord>, Status> {
    let id = container(view, text)?;
    let listed = view
        .container(&id)
        .filter(|container| container.state.is_listed());
    listed
        .cloned()
        .ok_or_else(|| Status::not_found(format!("no container {id}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELD: Field<'static> = Field::root("container_id");

    #[test]
    fn the_beginning_of_one_id_is_enough() {
        let ids = ["a".repeat(64), format!("ab{}", "0".repeat(62))];
        let all = || ids.iter().map(String::as_str);
        assert_eq!(resolve(&FIELD, "aa", all()).unwrap(), ids[0]);
        assert_eq!(resolve(&FIELD, &ids[1], all()).unwrap(), ids[1]);
        assert_eq!(
            resolve(&FIELD, "c", all()).unwrap(),
            "c",
            "unknown is for the caller to judge"
        );
        resolve(&FIELD, "a", all()).unwrap_err();
        resolve(&FIELD, "", all()).unwrap_err();
        resolve(&FIELD, "../a", all()).unwrap_err();
    }
}
