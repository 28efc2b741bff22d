//! What registries and those who name images send.

use berth_image_service::reference::Reference;

/// An image reference: what is taken prints as something that means the same.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(reference) = text.parse::<Reference>() {
        let printed = reference.to_string();
        let again: Reference = printed.parse().expect("a printed reference is one");
        assert_eq!(again.to_string(), printed);
    }
}
