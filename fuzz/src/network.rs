//! What CNI configuration files and plugins say.

use berth_netplugin::spec::NetworkList;

/// A configuration file.
pub fn conflist(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = NetworkList::parse(text);
    }
}
