//! Who may send to an address: routing rules by user (fib_rules; `linux/fib_rules.h`, Linux 4.10).

use std::io;
use std::net::Ipv6Addr;

use super::{Body, LinkError, NLM_F_CREATE, NLM_F_EXCL, request};

const FRA_DST: u16 = 1;
const FRA_PRIORITY: u16 = 6;
const FRA_UID_RANGE: u16 = 20;
const FR_ACT_PROHIBIT: u8 = 8;
/// All users but root. The last number is none.
const OTHERS: [u32; 2] = [1, u32::MAX - 1];
/// Before all rules that lead anywhere; the local table's, which comes before, knows only our own addresses.
const PRIORITY: u32 = 1;

/// Lets only root, and the kernel itself, send to `address`: others get EACCES. A rule that is there already is fine.
///
/// # Errors
/// [`LinkError::Rule`]: EAFNOSUPPORT or EOPNOTSUPP if this kernel has no rules for IPv6 (`CONFIG_IPV6_MULTIPLE_TABLES`).
pub fn only_root_reaches(address: Ipv6Addr) -> Result<(), LinkError> {
    match request(libc::RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, &body(address)) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(LinkError::Rule { address, source: error }),
        _ => Ok(()),
    }
}

/// Takes the rule of [`only_root_reaches`] back, if it is there.
///
/// # Errors
/// As there.
pub fn everybody_reaches(address: Ipv6Addr) -> Result<(), LinkError> {
    match request(libc::RTM_DELRULE, 0, &body(address)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LinkError::Rule { address, source: error }),
        _ => Ok(()),
    }
}

/// `struct fib_rule_hdr` and its attributes.
fn body(address: Ipv6Addr) -> Body {
    let family = u8::try_from(libc::AF_INET6).unwrap_or_default();
    let header = [family, 128, 0, 0, 0, 0, 0, FR_ACT_PROHIBIT, 0, 0, 0, 0];
    Body::new(&header)
        .attr(FRA_DST, &address.octets())
        .attr(FRA_PRIORITY, &PRIORITY.to_ne_bytes())
        .attr(FRA_UID_RANGE, &OTHERS.map(u32::to_ne_bytes).concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link;
    use crate::netns::Namespace;
    use std::net::{IpAddr, UdpSocket};

    #[test]
    fn only_root_reaches_an_address_with_such_a_rule() {
        let reach = |user: u32| {
            std::thread::spawn(move || {
                // The thread's own: nobody else's rights change.
                rustix::thread::set_thread_uid(rustix::thread::Uid::from_raw(user)).unwrap();
                UdpSocket::bind("[::]:0").unwrap().send_to(b"x", "[fd57::3]:9")
            })
            .join()
            .unwrap()
        };
        let namespace = Namespace::new().unwrap();
        namespace
            .run(|| {
                let index = link::create("st0", "dummy")
                    .or_else(|_| link::create("st0", "veth"))
                    .unwrap();
                for nic in link::list().unwrap() {
                    link::set_up(nic.index).unwrap();
                }
                link::add_address(index, "fd57::2".parse::<IpAddr>().unwrap(), 127).unwrap();
                assert!(reach(65_534).is_ok());
                only_root_reaches("fd57::3".parse().unwrap()).unwrap();
                only_root_reaches("fd57::3".parse().unwrap()).unwrap();
                assert!(reach(0).is_ok());
                assert_eq!(reach(65_534).unwrap_err().raw_os_error(), Some(libc::EACCES));
                everybody_reaches("fd57::3".parse().unwrap()).unwrap();
                everybody_reaches("fd57::3".parse().unwrap()).unwrap();
                assert!(reach(65_534).is_ok());
            })
            .unwrap();
    }
}
