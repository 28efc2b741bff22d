//! The power goes at any moment: what the disk then has is an image that is whole, or none.
//!
//! The store lies on ext4, on a loop device, over a file of a FUSE file system of our own that
//! keeps every write and flush. For each point of that log a disk is made of everything that was
//! flushed by then and a random part of what was not, mounted, and looked at by a daemon of
//! another boot.

#[path = "power/fuse.rs"]
mod fuse;
mod support;

use berth_image_service::layer::{Finding, Pace};
use berth_image_service::progress::Progress;
use berth_image_service::service::ImageService;
use berth_sys::{clone::flag, namespace};
use fuse::{Disk, Event};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{Picture, Server, tar_of};

const DISK_BYTES: usize = 64 << 20;
/// A disk writes what it writes in sectors; the kernel's unit is a page.
const PIECE_BYTES: usize = 4096;

/// At how many points the power goes.
fn points() -> usize {
    let wanted = std::env::var("BERTH_POWER_CUT_POINTS").ok();
    wanted.map_or(50, |text| text.parse().expect("a number of points"))
}

/// xorshift64: the same points in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let words = (0..count.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(count).collect()
}

/// By path, the files of an image.
type Files = BTreeMap<String, Vec<u8>>;

/// An image of some layers, each with a large file and some small ones.
fn image(seeds: &[u64]) -> (Picture, Files) {
    let mut files = Files::new();
    let mut tars = Vec::new();
    for seed in seeds {
        let mut layer: Vec<(String, Vec<u8>)> =
            vec![(format!("large-{seed}"), bytes(*seed, 700_000))];
        for n in 0..20 {
            let name = format!("small-{seed}-{n}");
            layer.push((name, bytes(seed * 1000 + n, 100 + 200 * n as usize)));
        }
        let entries: Vec<(&str, &[u8])> = layer
            .iter()
            .map(|(name, content)| (name.as_str(), content.as_slice()))
            .collect();
        tars.push(tar_of(&entries));
        files.extend(layer);
    }
    let picture = Picture::of(&tars, "gzip", json!({"Cmd": ["/x"]}));
    (picture, files)
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A mounted ext4 in a file.
struct Mounted(PathBuf);

impl Mounted {
    fn new(file: &Path, point: &Path) -> Mounted {
        let (file, at) = (file.to_str().unwrap(), point.to_str().unwrap());
        run("mount", &["-o", "loop", "-t", "ext4", file, at]);
        Mounted(point.into())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A thread that removes files may still be at it for a moment.
        for _ in 0..200 {
            let flags = rustix::mount::UnmountFlags::empty();
            if rustix::mount::unmount(&self.0, flags).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Has this thread, and what it starts, in a boot of its own.
fn boot(dir: &Path, name: &str) {
    let file = dir.join("boot-id");
    fs::write(&file, format!("00000000-0000-0000-0000-{name:0>12}\n")).unwrap();
    let point = "/proc/sys/kernel/random/boot_id";
    rustix::mount::mount_bind(&file, point).unwrap();
}

fn open(at: &Path, hosts: &Path) -> ImageService {
    let mut settings =
        berth_image_service::service::Settings::new(at.join("images"), at.join("containers"));
    settings.certs_d = vec![hosts.into()];
    ImageService::open(settings).unwrap()
}

struct World {
    server: Server,
    references: Vec<String>,
    files: Vec<Files>,
    ids: Vec<String>,
    hosts: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl World {
    fn pull(&self, service: &ImageService, nth: usize) {
        let pulled =
            self.runtime
                .block_on(service.pull(&self.references[nth], None, &Progress::new()));
        assert_eq!(pulled.unwrap().image_id, self.ids[nth]);
    }

    /// Every file of a listed image has every byte.
    fn assert_whole(&self, service: &ImageService, id: &str, why: &str) {
        let nth = self.ids.iter().position(|known| known == id).unwrap();
        let mount = service.mount_image(id).unwrap();
        let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(&root).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let content = fs::read(root.join(&name)).unwrap();
            assert!(
                self.files[nth].get(&name) == Some(&content),
                "{why}: {name}"
            );
            found.insert(name);
        }
        let expected: BTreeSet<String> = self.files[nth].keys().cloned().collect();
        assert_eq!(found, expected, "{why}");
    }
}

/// What is certain from some event on: these images are there, as nobody removes them.
struct Promise {
    from: usize,
    until: usize,
    image: usize,
}

#[test]
fn a_power_cut_leaves_whole_images_or_none() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    // Whatever becomes of this test, its mounts go with it.
    namespace::unshare(flag::NEWNS).unwrap();
    let private =
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let made = |name: &str| {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (fuse_point, live, copy, hosts) =
        (made("fuse"), made("live"), made("copy"), made("certs.d"));

    // Two share a layer, one is removed, one is pulled last.
    let images = [image(&[1, 2, 3]), image(&[1, 4]), image(&[5, 6])];
    let mut all = Picture::default();
    let mut manifests = BTreeMap::new();
    for (nth, (picture, _)) in images.iter().enumerate() {
        all.blobs.extend(picture.blobs.clone());
        manifests.insert(format!("{nth}"), picture.clone());
    }
    let server = Server::start(move |request| {
        let path = request.path().to_owned();
        let tag = path.rsplit('/').next().unwrap_or_default();
        support::serve(manifests.get(tag).unwrap_or(&all), request)
    });
    let host = hosts.join(server.name());
    fs::create_dir(&host).unwrap();
    let toml = format!("server = \"http://{}\"\n", server.name());
    fs::write(host.join("hosts.toml"), toml).unwrap();
    let world = World {
        references: (0..images.len())
            .map(|nth| format!("{}/app:{nth}", server.name()))
            .collect(),
        ids: images.iter().map(|(p, _)| p.image_id.clone()).collect(),
        files: images.iter().map(|(_, files)| files.clone()).collect(),
        server,
        hosts,
        runtime: tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap(),
    };

    let disk = Disk::mount(&fuse_point, DISK_BYTES);
    let path = disk.path();
    run(
        "mkfs.ext4",
        &["-q", "-F", "-J", "size=4", path.to_str().unwrap()],
    );
    boot(dir.path(), "1");
    let mounted = Mounted::new(&path, &live);
    let base = disk.record();
    let service = open(&live, &world.hosts);
    let mut promises = Vec::new();
    for image in 0..world.ids.len() {
        world.pull(&service, image);
        promises.push(Promise {
            image,
            from: disk.events(),
            until: usize::MAX,
        });
        if image == 1 {
            promises[0].until = disk.events();
            let removed = service.remove(&world.references[0]);
            assert!(world.runtime.block_on(removed).unwrap());
            // What is last is cut off before its files are synced, what was before after it.
            service.settle().unwrap();
        }
    }
    service.finish_removals();
    drop(service);
    drop(mounted);
    let log = disk.log();
    assert!(log.iter().any(|event| matches!(event, Event::Flush)));
    cut_everywhere(&world, &base, &log, &promises, dir.path(), &copy);
}

fn cut_everywhere(
    world: &World,
    base: &[u8],
    log: &[Event],
    promises: &[Promise],
    dir: &Path,
    copy: &Path,
) {
    let mut random = Random(0x5eed_0fb3_77aa);
    let scratch = Path::new("/dev/shm").join(format!("berth-power-{}", std::process::id()));
    let _gone = Removed(scratch.clone());
    let count = points();
    let mut listed_at_all = 0;
    let mut listed_later = 0;
    for nth in 0..count {
        let point = match nth {
            0 => log.len(),
            _ => random.below(log.len()),
        };
        let state = state_after(base, log, point, &mut random);
        fs::write(&scratch, &state).unwrap();
        boot(dir, &format!("{}", nth + 2));
        let why = format!("power cut {nth} after {point} of {} events", log.len());
        let _mounted = Mounted::new(&scratch, copy);
        let service = open(copy, &world.hosts);
        let listed_at_once = service.list().len();
        service.finish_rebuilding();
        listed_later += service.list().len() - listed_at_once;
        let listed: Vec<String> = service
            .list()
            .iter()
            .map(|image| image.id.clone())
            .collect();
        listed_at_all += listed.len();
        for id in &listed {
            world.assert_whole(&service, id, &why);
        }
        for promise in promises {
            if (promise.from..promise.until).contains(&point) {
                let id = &world.ids[promise.image];
                assert!(
                    listed.contains(id),
                    "{why}: an image that was pulled is gone"
                );
            }
        }
        service.verify(&mut Pace::full(), &mut |verified| {
            // A manifest of a pull that was not answered is nobody's, and not missed.
            let is_nobodys = verified.finding == Finding::Gone && verified.images.is_empty();
            assert!(
                is_nobodys || matches!(verified.finding, Finding::Whole { .. }),
                "{why}: {verified:?}"
            );
            true
        });
        // What is not there comes back.
        for nth in 0..world.ids.len() {
            world.pull(&service, nth);
            world.assert_whole(&service, &world.ids[nth], &why);
        }
        service.finish_removals();
        drop(service);
    }
    assert!(listed_at_all > 0, "no image was ever there");
    assert!(listed_later > 0, "no layer was ever unpacked again");
    assert!(!world.server.seen().is_empty());
}

/// The disk with everything that was flushed before `point`, and pieces of what was not.
fn state_after(base: &[u8], log: &[Event], point: usize, random: &mut Random) -> Vec<u8> {
    let flushed = log[..point]
        .iter()
        .rposition(|event| matches!(event, Event::Flush))
        .unwrap_or(0);
    let mut state = base.to_vec();
    for (nth, event) in log[..point].iter().enumerate() {
        let Event::Write { offset, data } = event else {
            continue;
        };
        for (piece_nth, piece) in data.chunks(PIECE_BYTES).enumerate() {
            if nth < flushed || random.below(2) == 0 {
                let at = offset + piece_nth * PIECE_BYTES;
                state[at..at + piece.len()].copy_from_slice(piece);
            }
        }
    }
    state
}

struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
