//! Mounts and devices of a container.

use super::field::{Field, Quoted, Result};
use super::{image, security, text};
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container_spec::{DeviceRequest, MountRequest, Propagation};

/// What may stand in mount_options. Source: CRI `Mount.mount_options`.
const OPTIONS: [&str; 3] = ["noexec", "nodev", "nosuid"];

/// One mount as asked for.
pub fn mount(field: &Field<'_>, given: &cri::Mount) -> Result<MountRequest> {
    let target = field.at("container_path");
    let container_path = text::container_path(&target, &given.container_path)?;
    if container_path == "/" {
        return Err(target.invalid("must not be the root of the container"));
    }
    // CRI's Go clients send an empty message where they mean none.
    let image = given.image.as_ref().filter(|image| !image.image.is_empty());
    let host = field.at("host_path");
    let host_path = match image {
        Some(_) if !given.host_path.is_empty() => {
            return Err(host.invalid("must be empty when image is given"));
        }
        Some(_) => Default::default(),
        None if given.host_path.is_empty() => return Err(host.invalid("must not be empty")),
        None => text::host_path(&host, &given.host_path)?,
    };
    let propagation = match security::enumeration(&field.at("propagation"), given.propagation)? {
        cri::MountPropagation::PropagationPrivate => Propagation::Private,
        cri::MountPropagation::PropagationHostToContainer => Propagation::HostToContainer,
        cri::MountPropagation::PropagationBidirectional => Propagation::Bidirectional,
    };
    if image.is_some() {
        if !given.readonly {
            return Err(field
                .at("readonly")
                .invalid("must be set: an image is mounted read-only"));
        }
        if propagation != Propagation::Private {
            return Err(field
                .at("propagation")
                .invalid("must be PRIVATE for an image"));
        }
    }
    let sub_path = field.at("image_sub_path");
    if image.is_none() && !given.image_sub_path.is_empty() {
        return Err(sub_path.invalid("is given without image"));
    }
    text::relative_path(&sub_path, &given.image_sub_path)?;
    if given.recursive_read_only {
        let recursive = field.at("recursive_read_only");
        if !given.readonly {
            return Err(recursive.invalid("needs readonly"));
        }
        // Source: CRI: a mount that receives others later cannot stay read-only recursively.
        if propagation != Propagation::Private {
            return Err(recursive.invalid("needs propagation PRIVATE"));
        }
    }
    for (i, option) in given.mount_options.iter().enumerate() {
        if !OPTIONS.contains(&option.as_str()) {
            let problem = format!("{} is not one of {}", Quoted(option), OPTIONS.join(", "));
            return Err(field.at("mount_options").index(i).invalid(problem));
        }
    }
    Ok(MountRequest {
        container_path,
        host_path,
        image: image
            .map(|image| image::request(&field.at("image"), image))
            .transpose()?,
        // Whoever has the images finds it.
        image_id: String::new(),
        image_sub_path: given.image_sub_path.clone(),
        readonly: given.readonly,
        recursive_readonly: given.recursive_read_only,
        selinux_relabel: given.selinux_relabel,
        propagation,
        uid_mappings: security::id_mappings(&field.at("uidMappings"), &given.uid_mappings)?,
        gid_mappings: security::id_mappings(&field.at("gidMappings"), &given.gid_mappings)?,
        options: given.mount_options.clone(),
    })
}

/// A mount as CRI shows it.
pub fn to_cri(mount: &MountRequest) -> cri::Mount {
    let mappings = |mappings: &[berth_sandbox::pod_spec::IdMapping]| {
        mappings.iter().map(security::id_mapping).collect()
    };
    cri::Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.to_string_lossy().into_owned(),
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: match mount.propagation {
            Propagation::Private => cri::MountPropagation::PropagationPrivate,
            Propagation::HostToContainer => cri::MountPropagation::PropagationHostToContainer,
            Propagation::Bidirectional => cri::MountPropagation::PropagationBidirectional,
        }
        .into(),
        uid_mappings: mappings(&mount.uid_mappings),
        gid_mappings: mappings(&mount.gid_mappings),
        recursive_read_only: mount.recursive_readonly,
        image: mount.image.as_ref().map(|request| cri::ImageSpec {
            image_ref: mount.image_id.clone(),
            ..image::to_cri(request)
        }),
        image_sub_path: mount.image_sub_path.clone(),
        mount_options: mount.options.clone(),
    }
}

/// One device node as asked for.
pub fn device(field: &Field<'_>, given: &cri::Device) -> Result<DeviceRequest> {
    let host_path = text::host_path(&field.at("host_path"), &given.host_path)?;
    let container_path = match given.container_path.as_str() {
        "" => given.host_path.as_str(),
        path => path,
    };
    let letters = given.permissions.as_bytes();
    let known = letters.iter().all(|letter| b"rwm".contains(letter));
    let once = letters
        .iter()
        .enumerate()
        .all(|(i, letter)| !letters[..i].contains(letter));
    if letters.is_empty() || !known || !once {
        let problem = format!("{} is not made of r, w and m", Quoted(&given.permissions));
        return Err(field.at("permissions").invalid(problem));
    }
    Ok(DeviceRequest {
        host_path,
        container_path: text::container_path(&field.at("container_path"), container_path)?,
        permissions: given.permissions.clone(),
    })
}

/// A device's fully qualified name: vendor/class=name.
/// Source: CDI specification, "Fully qualified device names".
pub fn cdi_device(field: &Field<'_>, name: &str) -> Result<String> {
    let word = |text: &str, extra: &[u8]| {
        !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || extra.contains(&b))
    };
    let parts = name.split_once('=').and_then(|(kind, device)| {
        kind.split_once('/')
            .map(|(vendor, class)| (vendor, class, device))
    });
    let valid = parts.is_some_and(|(vendor, class, device)| {
        vendor.starts_with(|c: char| c.is_ascii_alphabetic())
            && class.starts_with(|c: char| c.is_ascii_alphabetic())
            && word(vendor, b"_-.")
            && word(class, b"_-")
            && word(device, b"_-.:")
    });
    if !valid {
        let problem = format!("{} is not a CDI name: vendor/class=device", Quoted(name));
        return Err(field.at("name").invalid(problem));
    }
    Ok(name.to_owned())
}
