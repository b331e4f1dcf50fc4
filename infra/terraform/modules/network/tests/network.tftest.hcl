mock_provider "aws" {
  mock_data "aws_region" {
    defaults = { name = "eu-central-1" }
  }
}

variables {
  name  = "stage"
  zones = ["eu-central-1a", "eu-central-1b"]
}

run "one_nat_serves_all_zones_where_that_is_enough" {
  assert {
    condition     = length(aws_nat_gateway.this) == 1 && length(aws_route.through_nat) == 2
    error_message = "one NAT gateway, and a way out of every private subnet"
  }
  assert {
    condition     = aws_vpc_endpoint.s3.service_name == "com.amazonaws.eu-central-1.s3"
    error_message = "S3 is reached without NAT"
  }
  assert {
    condition     = length(aws_default_security_group.closed.ingress) == 0 && length(aws_default_security_group.closed.egress) == 0
    error_message = "the default security group lets nothing through"
  }
}

run "each_zone_has_its_own_nat_where_none_may_fail_with_another" {
  variables {
    nat_per_zone = true
  }
  assert {
    condition     = length(aws_nat_gateway.this) == 2
    error_message = "a NAT gateway in each zone"
  }
}

run "subnets_do_not_overlap_and_give_no_public_addresses" {
  command = plan
  variables {
    cidr  = "10.9.0.0/20"
    zones = ["a", "b", "c", "d", "e", "f", "g", "h"]
  }
  assert {
    condition = length(distinct(concat(
      [for subnet in aws_subnet.public : subnet.cidr_block],
      [for subnet in aws_subnet.private : subnet.cidr_block],
    ))) == 16
    error_message = "sixteen subnets, each with its own addresses"
  }
  assert {
    condition     = alltrue([for subnet in aws_subnet.public : !subnet.map_public_ip_on_launch])
    error_message = "no host gets a public address by itself"
  }
}

run "one_zone_is_refused" {
  command = plan
  variables {
    zones = ["eu-central-1a"]
  }
  expect_failures = [var.zones]
}

run "the_same_zone_twice_is_refused" {
  command = plan
  variables {
    zones = ["eu-central-1a", "eu-central-1a"]
  }
  expect_failures = [var.zones]
}

run "addresses_that_are_none_are_refused" {
  command = plan
  variables {
    cidr = "10.40.0.0"
  }
  expect_failures = [var.cidr]
}

run "a_network_that_is_too_small_is_refused" {
  command = plan
  variables {
    cidr = "10.40.0.0/24"
  }
  expect_failures = [var.cidr]
}

run "a_name_with_capitals_is_refused" {
  command = plan
  variables {
    name = "Stage"
  }
  expect_failures = [var.name]
}
