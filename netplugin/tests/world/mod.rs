//! A host, what is outside of it, and pods: network namespaces that live as
//! long as the test, and go with it whatever happens.
#![allow(dead_code, reason = "each test binary uses its part")]

use berth_netplugin::bandwidth::Bandwidth;
use berth_netplugin::bridge::{Attach, Attachment, Bridge, NetError, Settings};
use berth_netplugin::{PortMapping, netns};
use berth_sys::clone::flag;
use berth_sys::namespace::unshare;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a connection may take before it counts as refused.
pub const PATIENCE: Duration = Duration::from_millis(1500);

/// A network namespace, held by a descriptor alone.
pub struct Netns {
    file: File,
}

impl Netns {
    pub fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(flag::NEWNET).expect("these tests run as root");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self {
            file: made.join().unwrap(),
        }
    }

    /// A path that other processes can open too.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(self.file.as_fd(), work).unwrap()
    }

    /// Runs a program in it; what it wrote.
    pub fn sh(&self, script: &str) -> String {
        let output = self.run(|| {
            Command::new("/bin/sh")
                .args(["-ec", script])
                .output()
                .unwrap()
        });
        assert!(
            output.status.success(),
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// A server on `address` that tells each client how it is seen.
    pub fn serve(&self, address: &str) -> Server {
        let listener = Arc::new(self.run(|| TcpListener::bind(address).unwrap()));
        let shared = listener.clone();
        let thread = std::thread::spawn(move || {
            while let Ok((mut stream, peer)) = shared.accept() {
                let _ = write!(stream, "{}", peer.ip());
            }
        });
        Server {
            listener,
            thread: Some(thread),
        }
    }

    /// How the server at `address` sees who asks from here.
    pub fn ask(&self, address: &str) -> io::Result<IpAddr> {
        let address: SocketAddr = address.parse().unwrap();
        self.run(|| {
            let mut stream = TcpStream::connect_timeout(&address, PATIENCE)
                .map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let seen: IpAddr = answer.parse().map_err(io::Error::other)?;
            Ok(seen.to_canonical())
        })
    }

    /// A server on `address` that tells the sender of each datagram how it is seen.
    pub fn serve_udp(&self, address: &str) -> UdpServer {
        let socket = Arc::new(self.run(|| UdpSocket::bind(address).unwrap()));
        let (shared, ended) = (socket.clone(), Arc::new(AtomicBool::new(false)));
        let over = ended.clone();
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                if let Ok((_, peer)) = shared.recv_from(&mut [0; 64]) {
                    let seen = peer.ip().to_canonical().to_string();
                    let _ = shared.send_to(seen.as_bytes(), peer);
                }
            }
        });
        UdpServer {
            ended,
            thread: Some(thread),
        }
    }

    /// How the datagram server at `address` sees who asks from here.
    pub fn ask_udp(&self, address: &str) -> io::Result<IpAddr> {
        let address: SocketAddr = address.parse().unwrap();
        let own = if address.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let failed = |error: io::Error| io::Error::new(error.kind(), format!("{address}: {error}"));
        let socket = self.udp(own);
        socket.connect(address).map_err(failed)?;
        socket.send(b"who am I?").map_err(failed)?;
        let mut answer = [0; 64];
        let length = socket.recv(&mut answer).map_err(failed)?;
        std::str::from_utf8(&answer[..length])
            .map_err(io::Error::other)?
            .parse()
            .map_err(io::Error::other)
    }

    /// A UDP socket bound here.
    pub fn udp(&self, address: &str) -> UdpSocket {
        let socket = self.run(|| UdpSocket::bind(address).unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }
}

pub struct Server {
    listener: Arc<TcpListener>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let _ = self.thread.take().unwrap().join();
    }
}

pub struct UdpServer {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

/// A host with an uplink to another machine, and state of its own.
pub struct World {
    pub host: Netns,
    /// 198.51.100.2 and fd99::2; knows no way to pods.
    pub outside: Netns,
    pub dir: tempfile::TempDir,
}

/// The host as the outside sees it.
pub const HOST4: &str = "198.51.100.1";
pub const HOST6: &str = "fd99::1";
pub const OUTSIDE4: &str = "198.51.100.2";
pub const OUTSIDE6: &str = "fd99::2";

impl World {
    pub fn new() -> Self {
        let (host, outside) = (Netns::new(), Netns::new());
        host.sh(&format!(
            "ip link set lo up
             ip link add up0 type veth peer name up1
             ip link set up1 netns {}
             echo 0 > /proc/sys/net/ipv6/conf/up0/accept_dad
             ip link set up0 mtu 1400 up
             ip address add {HOST4}/24 dev up0
             ip address add {HOST6}/64 dev up0 nodad",
            outside_pid_path(&outside)
        ));
        outside.sh(&format!(
            "ip link set lo up
             echo 0 > /proc/sys/net/ipv6/conf/up1/accept_dad
             ip link set up1 mtu 1400 up
             ip address add {OUTSIDE4}/24 dev up1
             ip address add {OUTSIDE6}/64 dev up1 nodad"
        ));
        host.sh(&format!(
            "ip route add default via {OUTSIDE4}; ip -6 route add default via {OUTSIDE6}"
        ));
        let world = Self {
            host,
            outside,
            dir: tempfile::tempdir().unwrap(),
        };
        world.settle();
        world
    }

    /// Waits until both ends of the uplink pass packets on and hear who asks for them: the
    /// kernel does both when it comes to it, and drops what is sent before.
    fn settle(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        // The groups are those of HOST6 and OUTSIDE6.
        let ends = [
            (&self.host, "up0", "ff02::1:ff00:1"),
            (&self.outside, "up1", "ff02::1:ff00:2"),
        ];
        for (netns, link, group) in ends {
            let look = format!("ip -o link show {link}; ip -6 maddress show dev {link}");
            loop {
                let seen = netns.sh(&look);
                if seen.contains(" state UP ") && seen.contains(group) {
                    break;
                }
                assert!(Instant::now() < deadline, "{link} does not come up");
                std::thread::yield_now();
            }
        }
    }

    pub fn settings(&self) -> Settings {
        Settings {
            ipv4: "10.77.0.0/24".parse().ok(),
            ipv6: "fd77::/64".parse().ok(),
            ..Settings::new(self.dir.path().join("network"))
        }
    }

    pub fn bridge(&self) -> Bridge {
        Bridge::open(self.settings()).unwrap()
    }

    /// A pod of its own, attached.
    pub fn pod(&self, bridge: &Bridge, id: &str) -> Pod {
        self.try_pod(bridge, id, &[]).unwrap()
    }

    pub fn try_pod(
        &self,
        bridge: &Bridge,
        id: &str,
        ports: &[PortMapping],
    ) -> Result<Pod, NetError> {
        Pod::on(&self.host, bridge, id, ports)
    }

    pub fn attach(
        &self,
        bridge: &Bridge,
        id: &str,
        netns: &Netns,
        ports: &[PortMapping],
    ) -> Result<Attachment, NetError> {
        attach(&self.host, bridge, id, netns, ports)
    }

    /// What pods may leave behind: links on the host, leases, elements, records.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found: Vec<String> = self
            .host
            .sh("ip -o link show type veth")
            .lines()
            .filter(|line| !line.contains(" up0@"))
            .map(str::to_owned)
            .collect();
        for dir in ["leases", "hostports", "attachments"] {
            let dir = self.dir.path().join("network").join(dir);
            found.extend(files(&dir).into_iter().filter(|name| name != ".lock"));
        }
        let rules = self.host.sh("nft list ruleset");
        found.extend(
            rules
                .lines()
                .filter(|line| line.contains("elements"))
                .map(str::to_owned),
        );
        found
    }

    pub fn rules(&self) -> String {
        self.host.sh("nft list ruleset")
    }
}

fn outside_pid_path(netns: &Netns) -> String {
    netns.path().display().to_string()
}

fn files(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

pub struct Pod {
    pub netns: Netns,
    pub attachment: Attachment,
}

/// Attaches the pod whose namespace `netns` is to a bridge of `host`.
pub fn attach(
    host: &Netns,
    bridge: &Bridge,
    id: &str,
    netns: &Netns,
    ports: &[PortMapping],
) -> Result<Attachment, NetError> {
    let path = netns.path();
    let request = Attach {
        id,
        name: id,
        netns: &path,
        ifname: "eth0",
        port_mappings: ports,
        bandwidth: Bandwidth::default(),
    };
    host.run(|| bridge.add(&request))
}

impl Pod {
    /// One of its own on `host`, attached.
    pub fn on(
        host: &Netns,
        bridge: &Bridge,
        id: &str,
        ports: &[PortMapping],
    ) -> Result<Self, NetError> {
        let netns = Netns::new();
        let attachment = attach(host, bridge, id, &netns, ports)?;
        Ok(Self { netns, attachment })
    }

    pub fn ip(&self, ipv4: bool) -> IpAddr {
        let ips = &self.attachment.ips;
        ips.iter()
            .find(|net| net.is_ipv4() == ipv4)
            .unwrap()
            .address()
    }

    /// "10.77.0.2:80" or "[fd77::2]:80".
    pub fn at(&self, ipv4: bool, port: u16) -> String {
        SocketAddr::new(self.ip(ipv4), port).to_string()
    }
}

/// Both addresses, "host:port" for each family.
pub fn both(v4: &str, v6: &str, port: u16) -> [String; 2] {
    [format!("{v4}:{port}"), format!("[{v6}]:{port}")]
}

pub fn close(stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Both);
}
